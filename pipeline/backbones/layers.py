"""The layers of any network, counted from the image on: what learning rates that fall with the depth go by."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

LISTS = (nn.ModuleList, nn.Sequential)


def layers_of(network: nn.Module) -> dict[str, int]:
    """Layer number of every parameter, 0 nearest the image.

    A block is a module with several layers inside, an item of a ModuleList or Sequential usually; each is a layer. What lies before,
    between or behind blocks (a stem, a head) is one layer each time. In a network without blocks a layer begins at every weight that is a
    matrix or a kernel, and norms and activations belong to the layer before them. Parameters of the network itself (a positional embedding)
    are in layer 0. Modules count in the order in which they were assigned, which should be the order of their use.
    """
    parts = [(name, part) for name, part in _parts(network) if next(part.parameters(), None) is not None]
    has_blocks = any(_is_block(part) for _, part in parts)
    numbers = {name: 0 for name, _ in network.named_parameters(recurse=False)}
    number, is_open = -1, False  # the layer of the part before, and whether another one may join it
    for prefix, part in parts:
        is_block = _is_block(part)
        begins = not has_blocks and any(parameter.ndim > 1 for parameter in part.parameters())
        if is_block or begins or not is_open:
            number += 1
        is_open = not is_block
        for name, _ in part.named_parameters(prefix):
            numbers.setdefault(name, number)
    return {name: numbers.get(name, 0) for name, _ in network.named_parameters()}


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, LISTS) or _holds_blocks(child):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _holds_blocks(module: nn.Module) -> bool:
    """Whether there is a list of blocks in it: a stage, or a whole network that another one wraps."""
    return any(isinstance(part, LISTS) and any(map(_is_block, part)) for part in module.modules())


def _is_block(module: nn.Module) -> bool:
    with_weights = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    return len(with_weights) > 1
