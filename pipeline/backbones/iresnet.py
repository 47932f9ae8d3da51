"""IResNet 18-200: the residual networks of face recognition, with the improved residual (IR) block of ArcFace (arXiv 1801.07698, 3.2.1).

Modules carry the names of InsightFace's arcface_torch, so that its state dicts load as they are.
"""

import torch
from torch import nn

from pipeline.backbones.recompute import Block, checkpoint_blocks

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


def conv(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps height and width at stride 1."""
    return nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)


class IRBlock(Block):
    """BN - conv 3x3 - BN - PReLU - conv 3x3 - BN, added to the input (1x1 convolution and BN where the shape changes).

    The stride sits in the second convolution; nothing follows the sum.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv(channels_in, channels_out, 3)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.prelu = nn.PReLU(channels_out)
        self.conv2 = conv(channels_out, channels_out, 3, stride)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(conv(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out))

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return residual + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """Images [b, 3, image_size, image_size] -> features [b, width]. `depth` is a key of DEPTHS; `image_size` a multiple of 16.

    The weight of the last batch norm stays 1 (a learned one could only rescale features that the loss normalises); its bias is learned.
    """

    def __init__(
        self, depth: int, width: int = 512, image_size: int = 112, dropout: float = 0.0, checkpoint_activations: bool = False
    ) -> None:
        super().__init__()
        blocks = DEPTHS[depth]
        self.conv1 = conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1 = _stage(64, 64, blocks[0])
        self.layer2 = _stage(64, 128, blocks[1])
        self.layer3 = _stage(128, 256, blocks[2])
        self.layer4 = _stage(256, 512, blocks[3])
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(512 * (image_size // 16) ** 2, width)
        self.features = nn.BatchNorm1d(width)
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)
        checkpoint_blocks(self, checkpoint_activations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x).flatten(1))
        with torch.autocast(x.device.type, enabled=False):  # as arcface_torch: the features are not rounded
            return self.features(self.fc(x.to(self.fc.weight.dtype)))


def _stage(channels_in: int, channels_out: int, blocks: int) -> nn.Sequential:
    """`blocks` blocks, the first of which halves height and width."""
    return nn.Sequential(IRBlock(channels_in, channels_out, 2), *(IRBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))
