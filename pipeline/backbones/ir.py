"""IR 18-101: the networks of AdaFace, CVLface and TFace. They are IResNets but for two things that matter in training: where a block keeps
the number of channels, its shortcut has no weights, also at stride 2, and the last batch norm has neither weight nor bias.

Modules carry the names of those projects, so that their state dicts load as they are.
"""

import torch
from torch import Tensor, nn

from pipeline.backbones.iresnet import DEPTHS, conv
from pipeline.backbones.recompute import Block, checkpoint_blocks

IR_DEPTHS = {"ir18": 18, "ir34": 34, "ir50": 50, "ir101": 100}
CHANNELS = (64, 64, 128, 256, 512)  # of the stem and behind each stage


class IRBlock(Block):
    """BN - conv 3x3 - BN - PReLU - conv 3x3 - BN, added to every `stride`-th pixel of the input (1x1 convolution and BN where the number of
    channels changes)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if channels_in != channels_out:
            self.shortcut_layer = nn.Sequential(conv(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            conv(channels_in, channels_out, 3),
            nn.BatchNorm2d(channels_out),
            nn.PReLU(channels_out),
            conv(channels_out, channels_out, 3, stride),
            nn.BatchNorm2d(channels_out),
        )

    def compute(self, x: Tensor) -> Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class IR(nn.Module):
    """Images [b, 3, image_size, image_size] -> features [b, width]. `name` is a key of IR_DEPTHS; `image_size` a multiple of 16."""

    def __init__(
        self, name: str, width: int = 512, image_size: int = 112, dropout: float = 0.0, checkpoint_activations: bool = False
    ) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(conv(3, CHANNELS[0], 3), nn.BatchNorm2d(CHANNELS[0]), nn.PReLU(CHANNELS[0]))
        blocks = []
        for stage, count in enumerate(DEPTHS[IR_DEPTHS[name]]):
            channels_in, channels_out = CHANNELS[stage : stage + 2]
            blocks += [IRBlock(channels_in, channels_out, 2), *(IRBlock(channels_out, channels_out, 1) for _ in range(count - 1))]
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(CHANNELS[-1]),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(CHANNELS[-1] * (image_size // 16) ** 2, width),
            nn.BatchNorm1d(width, affine=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        checkpoint_blocks(self, checkpoint_activations)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.input_layer(x))
        norm, dropout, flatten, fc, features = self.output_layer
        x = flatten(dropout(norm(x)))
        with torch.autocast(x.device.type, enabled=False):  # the features are not rounded
            return features(fc(x.to(next(fc.parameters()).dtype)))
