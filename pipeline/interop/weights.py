"""Weight files of other projects and of one's own: read without running them, unwrapped, and held against a network name by name."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dali_loaders.extras import extra
from dali_loaders.names import printable
from pipeline.interop import torch_files
from pipeline.plain_pickle import Refused

# Where training scripts keep the network within a checkpoint; the first that is there counts.
WRAPPERS = ("state_dict_backbone", "state_dict", "model_state_dict", "model", "backbone", "net", "network", "module")

MADE = 1 << 30  # bytes of sparse and expanded tensors that may be made out of less

# Left in a state dict by profilers (thop): counts, which no network asks for.
COUNTERS = ("total_ops", "total_params")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors by name of a torch.save or .safetensors file, on the CPU, contiguous, in the precision of the file.

    Taken off: what wraps the network in a checkpoint ({"state_dict": ...} and its like, Lightning's included) and the names that DDP and
    torch.compile add (`module.`, `_orig_mod.`). Names of an owner (`model.`, `backbone.`) are left to `fit`, which knows what it looks for.
    Nothing in the file is run: objects other than weights, as callbacks of a trainer, are passed over.

    Raises ValueError, in a sentence, for a file that cannot be read or holds no state dict.
    """
    return state_dict_of(read_file(path), str(path))


def fit(
    found: Mapping[str, Tensor], expected: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], network: str
) -> dict[str, Tensor]:
    """The tensors of `found` under the names, order and dtypes of `expected` (a module, on the meta device too, or its state dict), fit for
    its load_state_dict.

    Names may all have one prefix in `found`, of the module that owned the network; what lies outside it (a classifier, a teacher) is left
    out. Batch norms without `num_batches_tracked` get 0. `path` and `network` are for the sentences only.

    Raises ValueError that names the first three parameters, of each kind, that are missing, unknown or of another shape, or are not finite
    numbers, and says how many more there are.
    """
    expected = expected.state_dict() if isinstance(expected, nn.Module) else expected
    found = _without_owner(found, expected, path)
    faults = [
        *_listed("missing", (name for name in expected if name not in found and not name.endswith("num_batches_tracked"))),
        *_listed("unknown to it", (name for name in found if name not in expected and not name.endswith(COUNTERS))),
        *_listed(
            "of another shape or kind", filter(None, (_difference(name, found.get(name), wanted) for name, wanted in expected.items()))
        ),
    ]
    if faults:
        raise ValueError(f"{path} does not fit {network}: {'; '.join(faults)}.")
    fitted = {
        name: found[name].to(wanted.dtype) if name in found else torch.zeros(wanted.shape, dtype=wanted.dtype)
        for name, wanted in expected.items()
    }
    broken = _listed("not finite", (name for name, tensor in fitted.items() if not torch.isfinite(tensor).all()))
    if broken:
        raise ValueError(f"{path} cannot be used, since it holds NaN or infinity: {broken[0]}.")
    return fitted


def read_file(path: str | os.PathLike[str]) -> Any:
    """What a weight file holds, wrappers and all, on the CPU. Objects of classes that are no weights become empty stand-ins."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would let us wait, a device has no end
            raise ValueError(f"cannot read {path}: it is {'a directory' if stat.S_ISDIR(mode) else 'no regular file'}.")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    if str(path).endswith(".safetensors"):
        return _read_safetensors(path)
    try:
        with open(path, "rb") as file:
            torch_files.check(file)
            others = _other_classes(file)
            file.seek(0)
            with torch.serialization.safe_globals([(type(name, (_PassedOver,), {}), name) for name in others]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    except Refused as error:
        raise ValueError(f"{path} cannot be used, since {error}: export the network's state dict.") from error
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"{path} is not a file of weights written by torch.save, or holds more than weights: export its state dict."
        ) from error


def state_dict_of(loaded: Any, path: str) -> dict[str, Tensor]:
    """The network's tensors in what `read_file` gave, without the names that wrappers of modules add."""
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict() instead.")
    for _ in range(len(WRAPPERS)):  # a wrapper may hold itself
        loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)), loaded)
    tensors = {str(name).replace("_orig_mod.", ""): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        holds = ", ".join(map(_shown, list(loaded)[:5])) or "nothing"
        raise ValueError(f"{path} holds no state dict: there is {holds}, but none of {', '.join(WRAPPERS)}.")
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    made = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if tensor.layout != torch.strided or tensor.is_meta or size > tensor.untyped_storage().nbytes():
            made += size
        if tensor.is_meta or made > MADE:
            claim = "no numbers" if tensor.is_meta else "far fewer numbers in the file than its shape says"
            raise ValueError(f"{path} cannot be used: {_shown(name)} {tuple(tensor.shape)} has {claim}.")
    return {name: _plain(value) for name, value in tensors.items()}


def _shown(name: object) -> str:
    """A name out of a file, for sentences."""
    return printable(str(name))[:100]


class _PassedOver:
    """Stands in for an object of a class that is not ours to run."""

    def __new__(cls, *_: Any) -> _PassedOver:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _other_classes(file: Any) -> list[str]:
    """Dotted names of the classes and functions that a file asks for beside those of weights."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except ValueError:  # torch before 1.6 wrote no zip files; torch.load refuses other classes in them
        return []


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    with extra("train"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        return load_file(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}.") from error


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()).contiguous()


def _without_owner(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """`found` as it is, or what lies below the prefix under which most of the expected names are; ValueError if that is not one prefix."""
    heads = Counter(head for name in found for head in _heads(name) if name.removeprefix(head) in expected)
    best = [head for head, count in heads.items() if count == max(heads.values())] or [""]
    if len(best) > 1:
        raise ValueError(f"{path} holds the network {len(best)} times, under {', '.join(map(repr, best))}: save the state dict of one")
    prefix = best[0]
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def _heads(name: str) -> Iterator[str]:
    """All that may be a prefix of a dotted name: "", "a.", "a.b." of "a.b.c"."""
    yield from accumulate((f"{part}." for part in name.split(".")[:-1]), initial="")


def _difference(name: str, tensor: Tensor | None, wanted: Tensor) -> str | None:
    if tensor is None:
        return None
    if tensor.shape != wanted.shape:
        return f"{name} is {tuple(tensor.shape)} instead of {tuple(wanted.shape)}"
    if wanted.is_floating_point() and not tensor.is_floating_point():  # quantized, or complex
        return f"{name} is {str(tensor.dtype).removeprefix('torch.')} instead of a floating-point type"
    return None


def _listed(kind: str, names: Iterable[str]) -> list[str]:
    """["3 are KIND (a, b, c)"], or [] where there is none."""
    every = list(names)
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return [f"{len(every)} {'is' if len(every) == 1 else 'are'} {kind} ({', '.join(map(_shown, every[:3]))}{more})"] if every else []
