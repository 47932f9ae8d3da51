"""run.deterministic: the same command gives the same bits on the same hardware and number of ranks, also across interruptions."""

from __future__ import annotations

import os

import torch


def set_up(is_deterministic: bool) -> None:
    """Makes torch choose operations that always add up in the same order, or refuse those that have none. ValueError if CUDA was started
    without what cuBLAS needs for it."""
    if is_deterministic and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        if torch.cuda.is_initialized() and torch.cuda.memory_reserved():
            raise ValueError("run.deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before CUDA starts: export it")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which cuBLAS reads at its first product
    torch.use_deterministic_algorithms(is_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a pass over every new tensor, which nothing of ours reads before writing
    torch.backends.cudnn.deterministic = is_deterministic
