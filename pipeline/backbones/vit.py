"""Vision transformers T, S, B and L for faces, as InsightFace's arcface_torch defines them: without a class token, features are made of all
tokens. Modules carry the names of arcface_torch, so that its state dicts load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pipeline.backbones.recompute import Block, checkpoint_blocks

SIZES = {"vit_t": (256, 12), "vit_s": (512, 12), "vit_b": (512, 24), "vit_l": (768, 24)}  # channels of a token, blocks
HEADS = 8
PATCH = 9  # pixels; of 112, the last 4 rows and columns belong to no patch


class Attention(nn.Module):
    def __init__(self, channels: int, in_float32: bool) -> None:
        super().__init__()
        self.in_float32 = in_float32
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x_bTD: Tensor) -> Tensor:
        b, tokens, channels = x_bTD.shape
        query, key, value = self.qkv(x_bTD).reshape(b, tokens, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        if self.in_float32:
            with torch.autocast(x_bTD.device.type, enabled=False):
                mixed = scaled_dot_product_attention(query.float(), key.float(), value.float())
        else:
            mixed = scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(b, tokens, channels))


class Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Leaves out a branch for some images of the batch, in training, and makes it larger by as much for the others (arXiv 1603.09382)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x
        keep = 1 - self.share
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class TransformerBlock(Block):
    def __init__(self, channels: int, drop_path: float, float32_attention: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn = Attention(channels, float32_attention)
        self.drop_path = DropPath(drop_path)
        self.mlp = Mlp(channels)

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Images [b, 3, image_size, image_size] -> features [b, width]. `size` is a key of SIZES.

    drop_path   share of the images for which the last block's branches are left out; it grows evenly from 0 at the first
    mask_ratio  share of an image's tokens that training leaves out of all blocks; a learned token stands for them in the last layers
    """

    def __init__(
        self,
        size: str,
        width: int = 512,
        image_size: int = 112,
        drop_path: float = 0.0,
        mask_ratio: float = 0.0,
        float32_attention: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if image_size < PATCH:
            raise ValueError(f"backbone {size!r} needs images of at least {PATCH} pixels, its patch, not {image_size}")
        channels, depth = SIZES[size]
        tokens = (image_size // PATCH) ** 2
        self.kept = int(tokens * (1 - mask_ratio))
        if self.kept == 0:
            raise ValueError(f"mask_ratio {mask_ratio} of backbone {size!r} leaves no patch of the {tokens} of an image: lower it")
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, channels))
        # Without masks nothing uses it, and DDP would wait for its gradient.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, channels), requires_grad=mask_ratio > 0)
        self.patch_embed = PatchEmbed(channels)
        shares = [drop_path * block / (depth - 1) for block in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(channels, share, float32_attention) for share in shares)
        self.norm = nn.LayerNorm(channels)
        self.feature = nn.Sequential(
            nn.Linear(tokens * channels, channels, bias=False),
            nn.BatchNorm1d(channels, eps=2e-5),
            nn.Linear(channels, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
        )
        for token in (self.pos_embed, self.mask_token):  # arcface_torch truncates some of these at 2, a hundred standard deviations
            nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        checkpoint_blocks(self, checkpoint_activations)

    def forward(self, x: Tensor) -> Tensor:
        # As arcface_torch: patches, positions, sums over blocks and all behind these are in float32. Autocast rounds the linear layers of
        # the blocks, and the products between tokens if they are not told otherwise.
        with torch.autocast(x.device.type, enabled=False):
            x_bTD = self.patch_embed(x.to(self.pos_embed.dtype)) + self.pos_embed
        masks = self.training and self.kept < x_bTD.shape[1]
        if masks:
            noise_bT = torch.rand(x_bTD.shape[:2], device=x.device)
            kept_bKD = noise_bT.argsort(dim=1)[:, : self.kept, None].expand(-1, -1, x_bTD.shape[2])
            x_bTD = x_bTD.gather(1, kept_bKD)
        for block in self.blocks:
            x_bTD = block(x_bTD)
        with torch.autocast(x.device.type, enabled=False):
            x_bTD = self.norm(x_bTD.to(self.pos_embed.dtype))
            if masks:  # behind the norm and without a position, as arcface_torch
                x_bTD = self.mask_token.expand(len(x), self.pos_embed.shape[1], -1).scatter(1, kept_bKD, x_bTD)
            return self.feature(x_bTD.flatten(1))
