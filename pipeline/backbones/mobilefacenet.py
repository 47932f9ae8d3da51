"""MobileFaceNet (arXiv 1804.07573) in the two sizes of InsightFace's arcface_torch, where they are called mbf and mbf_large.

Modules carry the names of arcface_torch, so that its state dicts load as they are. Its forms differ from the paper's: they are wider, and
some convolutions that the paper has per channel are in groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS = {"mobilefacenet": (1, 4, 6, 2), "mobilefacenet_large": (2, 8, 12, 4)}  # residual blocks at each size of the map
WIDTHS = {"mobilefacenet": 128, "mobilefacenet_large": 256}  # channels of the first half
LAST = 512  # channels of the last map


class Convolution(nn.Module):
    """Convolution without bias - BN - PReLU; the last one of a bottleneck is linear."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        linear: bool = False,
    ) -> None:
        super().__init__()
        padding = size // 2 if padding is None else padding
        convolution = nn.Conv2d(channels_in, channels_out, size, stride, padding, groups=groups, bias=False)
        self.layers = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))
        if not linear:
            self.layers.append(nn.PReLU(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bottleneck(nn.Module):
    """1x1 to `inner` channels - 3x3 on each channel - 1x1 without activation; at stride 1 added to its input."""

    def __init__(self, channels_in: int, channels_out: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = stride == 1
        self.layers = nn.Sequential(
            Convolution(channels_in, inner),
            Convolution(inner, inner, 3, stride, groups=inner),
            Convolution(inner, channels_out, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class Stage(nn.Module):
    """Bottlenecks at one size of the map."""

    def __init__(self, channels: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Bottleneck(channels, channels, inner) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Head(nn.Module):
    """A kernel as large as the map for each channel (a weighted mean of all positions) - BN - linear - BN."""

    def __init__(self, width: int, map_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Convolution(LAST, LAST, map_size, groups=LAST, padding=0, linear=True),
            nn.Flatten(),
            nn.Linear(LAST, width, bias=False),
            nn.BatchNorm1d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MobileFaceNet(nn.Module):
    """Images [b, 3, image_size, image_size] -> features [b, width]. `size` is a key of BLOCKS; `image_size` a multiple of 16."""

    def __init__(self, size: str, width: int = 512, image_size: int = 112) -> None:
        super().__init__()
        blocks, channels = BLOCKS[size], WIDTHS[size]
        # arcface_torch: not per channel, as in the paper, but in 64 groups; the large form has residual blocks in its place.
        second = Convolution(channels, channels, 3, groups=64) if blocks[0] == 1 else Stage(channels, 128, blocks[0])
        self.layers = nn.ModuleList(
            [
                Convolution(3, channels, 3, stride=2),
                second,
                Bottleneck(channels, channels, 128, stride=2),
                Stage(channels, 128, blocks[1]),
                Bottleneck(channels, 2 * channels, 256, stride=2),
                Stage(2 * channels, 256, blocks[2]),
                Bottleneck(2 * channels, 2 * channels, 512, stride=2),
                Stage(2 * channels, 256, blocks[3]),
            ]
        )
        self.conv_sep = Convolution(2 * channels, LAST)
        self.features = Head(width, image_size // 16)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # as arcface_torch: its float32 begins before the last linear layer
            return self.features(self.conv_sep(x.to(next(self.features.parameters()).dtype)))
