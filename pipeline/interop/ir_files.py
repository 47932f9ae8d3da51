"""Checkpoints of AdaFace and CVLface: which network they hold, and in which order it takes the colours."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pipeline.backbones import BackboneConfig

STEMS = {"input_layer.0.weight": "output_layer.3.weight", "conv1.weight": "fc.weight"}  # first and last matrix of the two namings
BLOCK = {"input_layer.0.weight": re.compile(r"body\.(\d+)\."), "conv1.weight": re.compile(r"layer3\.(\d+)\.")}
NETWORKS = {
    "input_layer.0.weight": {8: "ir18", 16: "ir34", 24: "ir50", 49: "ir101"},  # by the blocks of the body
    "conv1.weight": {2: "iresnet18", 6: "iresnet34", 14: "iresnet50", 30: "iresnet100"},  # by those of the third stage
}


def network_of(found: Mapping[str, Tensor], path: str) -> tuple[BackboneConfig, int, str]:
    """The network whose weights these are, the size of its images, and the prefix that its names have.

    Raises ValueError for another network than IR or IResNet 18, 34, 50, 100 or 101.
    """
    for first, last in STEMS.items():
        for name in found:
            prefix = name.removesuffix(first)
            if not name.endswith(first) or prefix + last not in found:
                continue
            blocks = {match[1] for other in found if (match := BLOCK[first].match(other.removeprefix(prefix)))}
            width, inputs = found[prefix + last].shape
            if len(blocks) in NETWORKS[first] and inputs % 512 == 0:
                return BackboneConfig(NETWORKS[first][len(blocks)], width), 16 * round((inputs / 512) ** 0.5), prefix
    names = ", ".join(list(found)[:3])
    raise ValueError(f"{path} holds no IR or IResNet 18 to 101, which are those that can be imported: it begins with {names}.")


def with_rgb(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a network that takes blue, green and red, as those of the same one that takes red, green and blue: images are
    normalised alike in all colours, so exchanging the inputs of the first convolution is exact."""
    name = next(prefix + first for first in STEMS if prefix + first in found)
    return {**found, name: found[name].flip(1)}


def colors_beside(path: str) -> str | None:
    """ "rgb" or "bgr", as CVLface's configuration beside its weights says; None without one."""
    file = Path(path)
    for beside in (file.with_suffix(".yaml"), file.with_name("config.json")):
        if beside.is_file() and (said := re.search(r"color_space\W+(RGB|BGR)", beside.read_text(errors="replace"))):
            return said[1].lower()
    return None
