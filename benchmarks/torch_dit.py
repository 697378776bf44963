"""A compact PyTorch DiT with fused attention, as the yardstick of `benchmarks/backbones.py`.

Written from the paper (Peebles & Xie 2022): adaLN-Zero, pre-norm, fused qkv, tanh-GELU, fixed
position table. Same shapes and outputs as `lfm_jax.models.DiT`, one time and label embedding for
all blocks, `scaled_dot_product_attention`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoid(t: torch.Tensor, dim: int = 256) -> torch.Tensor:
    frequencies = torch.exp(-math.log(1e4) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.mlp_in = nn.Linear(hidden, 4 * hidden)
        self.mlp_out = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = x + gate1 * self.attention_out(y)
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp_out(F.gelu(self.mlp_in(y), approximate="tanh"))


class DiT(nn.Module):
    def __init__(self, hidden, depth, heads, patch=2, channels=4, size=32, num_classes=1000):
        super().__init__()
        self.patch, self.channels, self.grid = patch, channels, size // patch
        self.patches = nn.Linear(patch * patch * channels, hidden)
        self.register_buffer("positions", torch.randn(1, self.grid**2, hidden) * 0.02)
        self.time_in, self.time_out = nn.Linear(256, hidden), nn.Linear(hidden, hidden)
        self.labels = nn.Embedding(num_classes + 1, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(hidden, 2 * hidden)
        self.final_out = nn.Linear(hidden, patch * patch * channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Velocity ``[b, h, w, c]`` of latents ``[b, h, w, c]``."""
        b, g, p = len(x), self.grid, self.patch
        x = x.view(b, g, p, g, p, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, g * g, -1)
        x = self.patches(x) + self.positions
        c = self.time_out(F.silu(self.time_in(sinusoid(1000 * t)))) + self.labels(label)
        c = F.silu(c)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, -1)
        x = self.final_out(self.norm(x) * (1 + scale) + shift)
        x = x.view(b, g, g, p, p, self.channels).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, g * p, g * p, self.channels)
