"""One job, one data set: all ranks open it and compare what they see, and a run that resumes compares it with what it was trained on.
On several machines each has its own disks, copies and permissions."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from dali_loaders.sources import Source, fingerprint
from dali_loaders.waiting import waiting

# What a fingerprint (dali_loaders/sources/fingerprint.py) and a seed say about the order of images, beside what identities there are.
ORDER = ("images", "labels", "image_order", "weights", "seed")


def open_on_all_ranks(path: str, open_set: Callable[[], Source]) -> tuple[Source, dict[str, Any]]:
    """The set that `open_set` opens, and its fingerprint. Messages call it `path`. Every rank calls it; one all-gather of a few hundred
    bytes per rank. ValueError on every rank if one cannot open the set or sees another one."""
    source: Source | None = None
    fault: Exception | None = None
    mine: dict[str, Any] = {}
    try:
        source = open_set()
        mine = fingerprint(source)
    except Exception as error:  # whatever it is, the others wait for this rank
        fault = error
    answer = (socket.gethostname(), None if fault is None else str(fault) or repr(fault), mine)
    views: list[Any] = [answer]
    if dist.is_initialized():
        views *= dist.get_world_size()
        with waiting(f"all ranks to have opened {path}"):
            dist.all_gather_object(views, answer)
    if fault is not None:
        raise fault
    for rank, (host, reason, _) in enumerate(views):
        if reason is not None:
            raise ValueError(f"rank {rank} on {host} cannot open the data: {reason}")
    first_host, _, first = views[0]
    others = [(rank, host, view) for rank, (host, _, view) in enumerate(views) if view != first]
    if others:
        rank, host, view = others[0]
        seen = ", ".join(differences(view, first))
        more = f" (and {len(others) - 1} more ranks see other data than rank 0)" if len(others) > 1 else ""
        raise ValueError(
            f"{path} is not the same for all ranks: rank {rank} on {host} sees {seen}, which is what "
            f"rank 0 on {first_host} sees{more}; give every machine the same files, or a file system that all share"
        )
    assert source is not None
    return source, mine


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """How `theirs` differs from `ours`, in words; empty if it does not. What `ours` has no value of is not compared."""
    changed = {key for key, value in ours.items() if value is not None and key in theirs and theirs[key] != value}
    counts = {"num_classes": "identities", "images": "images"}
    found = [f"{theirs[key]} {what} instead of {ours[key]}" for key, what in counts.items() if key in changed]
    found += ["another run.seed"] if "seed" in changed else []
    if changed & {"num_classes", "images"}:
        return found  # so the rest differs too
    words = {
        "identities": "other names of identities",
        "labels": "other labels",
        "image_order": "other images, or the same in another order",
        "weights": "other data.weights, or other sizes of the sets",
        "lists": "other lists of pairs, folds or templates",
    }
    return found + [what for key, what in words.items() if key in changed]
