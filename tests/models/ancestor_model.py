"""The class-conditional DDPM U-Net of the public code of SFD, SalUn and Selective Amnesia, rewritten for the tests.

It is written from a description of theirs, and its parameters have the same names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block, which takes the concatenated embeddings of time and class."""

    def __init__(self, ins: int, outs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, ins, eps=1e-6)
        self.conv1 = nn.Conv2d(ins, outs, 3, padding=1)
        self.temb_cemb_proj = nn.Linear(2 * embedding, outs)
        self.norm2 = nn.GroupNorm(32, outs, eps=1e-6)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1)
        if ins != outs:
            self.nin_shortcut = nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_cemb_proj(F.silu(emb)).unsqueeze(-1).unsqueeze(-1)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Level(nn.Module):
    def __init__(self, blocks: list[Block], attention: list[Attention]) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(blocks), nn.ModuleList(attention)


class Sampled(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=0 if stride == 2 else 1)


class AncestorUNet(nn.Module):
    """For images of ``size`` pixels, with attention at height 16. None is the null label."""

    def __init__(self, size: int, width: int = 32, mult: tuple[int, ...] = (1, 2, 2), blocks: int = 2, classes=10):
        super().__init__()
        self.width, emb = width, 4 * width
        self.temb, self.cemb = nn.Module(), nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, emb), nn.Linear(emb, emb)])
        self.cemb.dense = nn.ModuleList([nn.Linear(width, emb), nn.Linear(emb, emb)])
        self.classes_emb = nn.Embedding(classes, width)
        self.null_classes_emb = nn.Parameter(torch.randn(width))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        outs = [width * m for m in mult]
        skips, channels = [width], width
        self.down = nn.ModuleList()
        for i, out in enumerate(outs):
            parts = []
            for _ in range(blocks):
                parts.append(Block(channels, out, emb))
                channels = out
                skips.append(out)
            level = Level(parts, [Attention(out) for _ in range(blocks)] if size >> i == 16 else [])
            if i < len(outs) - 1:
                level.downsample = Sampled(out, 2)
                skips.append(out)
            self.down.append(level)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = (
            Block(channels, channels, emb),
            Attention(channels),
            Block(channels, channels, emb),
        )
        ups = []
        for i in reversed(range(len(outs))):
            parts = []
            for _ in range(blocks + 1):
                parts.append(Block(channels + skips.pop(), outs[i], emb))
                channels = outs[i]
            level = Level(parts, [Attention(channels) for _ in range(blocks + 1)] if size >> i == 16 else [])
            if i > 0:
                level.upsample = Sampled(channels, 1)
            ups.append(level)
        # From the finest level, as in ``down``.
        self.up = nn.ModuleList(reversed(ups))
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float32))
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], 1))))
        embedded = self.null_classes_emb.expand(len(x), -1) if labels is None else self.classes_emb(labels)
        emb = torch.cat([temb, self.cemb.dense[1](F.silu(self.cemb.dense[0](embedded)))], 1)

        def level(part: Level, i: int, h: Tensor) -> Tensor:
            h = part.block[i](h, emb)
            return part.attn[i](h) if len(part.attn) else h

        skips = [self.conv_in(x)]
        for part in self.down:
            for i in range(len(part.block)):
                skips.append(level(part, i, skips[-1]))
            if hasattr(part, "downsample"):
                skips.append(part.downsample.conv(F.pad(skips[-1], (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], emb)), emb)
        for part in reversed(self.up):
            for i in range(len(part.block)):
                h = level(part, i, torch.cat([h, skips.pop()], 1))
            if hasattr(part, "upsample"):
                h = part.upsample.conv(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))
