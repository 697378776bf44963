"""Compact PyTorch networks, written from the papers with the tensor names of the published files.

They are oracles: no package ships these architectures. Random weights go through both sides.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def waves(t, dim, endpoint=False, sin_first=False):
    k = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - (1 if endpoint else 0))
    angles = t.double()[:, None] * 10000**-k
    parts = (angles.sin(), angles.cos()) if sin_first else (angles.cos(), angles.sin())
    return torch.cat(parts, 1).float()


def randomise(module, seed=0, scale=0.05):
    """Every tensor away from its initial value, zero-initialised ones above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


# ---- DiT with timm's names: LFM, facebook, SiT


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = (
            heads,
            nn.Linear(hidden, 3 * hidden),
            nn.Linear(hidden, hidden),
        )

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class DiTBlock(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.attn = Attention(hidden, heads)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(hidden, 4 * hidden), "fc2": nn.Linear(4 * hidden, hidden)}
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x, c):
        b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        norm = lambda z: F.layer_norm(z, z.shape[-1:], eps=1e-6)  # noqa: E731
        x = x + g1 * self.attn(norm(x) * (1 + s1) + b1)
        y = F.gelu(self.mlp["fc1"](norm(x) * (1 + s2) + b2), approximate="tanh")
        return x + g2 * self.mlp["fc2"](y)


class DiT(nn.Module):
    def __init__(self, hidden, depth, heads, patch, channels, out_channels, size, rows):
        super().__init__()
        self.patch, self.rows = patch, rows
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, hidden, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(rows, hidden)})
        grid = torch.arange(size // patch, dtype=torch.float64)
        omega = 10000 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
        wave = torch.cat([torch.sin(grid[:, None] * omega), torch.cos(grid[:, None] * omega)], 1)
        n = len(grid)
        columns, rows_ = wave.repeat(n, 1), wave.repeat_interleave(n, 0)
        table = torch.cat([columns, rows_], 1).float()[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(hidden, patch * patch * out_channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden)),
            }
        )

    def forward(self, x, t, y=None):
        """NCHW in and out."""
        x = self.x_embedder["proj"](x)
        n = x.shape[-1]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](waves(t, 256))
        y = torch.full(t.shape, self.rows - 1) if y is None else y
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        x = self.final_layer["linear"](
            F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        )
        b, p = len(x), self.patch
        x = x.view(b, n, n, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, -1, n * p, n * p)


# ---- the guided-diffusion U-Net


class GuidedRes(nn.Module):
    def __init__(self, cin, cout, emb, film, move=""):
        super().__init__()
        self.film, self.move = film, move
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, 1, 1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, cout * (2 if film else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, cout), nn.SiLU(), nn.Identity(), nn.Conv2d(cout, cout, 3, 1, 1)
        )
        self.skip_connection = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def resample(self, x):
        if self.move == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.move == "up" else x

    def forward(self, x, emb):
        y = self.in_layers[2](self.resample(self.in_layers[1](self.in_layers[0](x))))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, 1)
            y = self.out_layers[1:](self.out_layers[0](y) * (1 + scale) + shift)
        else:
            y = self.out_layers(y + e)
        return self.skip_connection(self.resample(x)) + y


class GuidedAttention(nn.Module):
    def __init__(self, channels, heads, new_order=False):
        super().__init__()
        self.new_order = new_order
        self.heads, self.norm = heads, nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = (
            nn.Conv1d(channels, 3 * channels, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x, emb=None):
        b, c, *_ = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, c, -1))
        if self.new_order:  # q, k and v one after the other instead of head by head
            qkv = qkv.view(b, 3, self.heads, c // self.heads, -1).transpose(1, 2)
        qkv = qkv.reshape(b * self.heads, 3 * c // self.heads, -1)
        q, k, v = (z.transpose(1, 2) for z in qkv.chunk(3, 1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, c, -1)
        return x + self.proj_out(y).view(x.shape)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x, emb=None):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x, emb=None):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Chain(nn.ModuleList):
    def forward(self, x, emb):
        for part in self:
            x = part(x) if isinstance(part, nn.Conv2d) else part(x, emb)
        return x


class GuidedUNet(nn.Module):
    def __init__(
        self,
        channels,
        mult,
        blocks,
        factors,
        heads,
        cin,
        cout,
        classes=0,
        film=True,
        inside=False,
        head_channels=0,
        new_order=False,
    ):
        super().__init__()
        emb, width, ds = 4 * channels, int(channels * mult[0]), 1
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes:
            self.label_emb = nn.Embedding(classes, emb)

        def attention(c):
            return GuidedAttention(c, c // head_channels if head_channels else heads, new_order)

        self.input_blocks = nn.ModuleList([Chain([nn.Conv2d(cin, width, 3, 1, 1)])])
        skips = [width]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                parts = [GuidedRes(width, int(m * channels), emb, film)]
                width = int(m * channels)
                parts += [attention(width)] if ds in factors else []
                self.input_blocks.append(Chain(parts))
                skips.append(width)
            if level < len(mult) - 1:
                down = GuidedRes(width, width, emb, film, "down") if inside else Down(width)
                self.input_blocks.append(Chain([down]))
                skips.append(width)
                ds *= 2
        middle = [GuidedRes(width, width, emb, film), attention(width)]
        self.middle_block = Chain([*middle, GuidedRes(width, width, emb, film)])
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                parts = [GuidedRes(width + skips.pop(), int(m * channels), emb, film)]
                width = int(m * channels)
                parts += [attention(width)] if ds in factors else []
                if level and i == blocks:
                    parts.append(GuidedRes(width, width, emb, film, "up") if inside else Up(width))
                    ds //= 2
                self.output_blocks.append(Chain(parts))
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, cout, 3, 1, 1)
        )

    def forward(self, x, t, y=None):
        emb = self.time_embed(waves(t, self.channels))
        emb = emb if y is None else emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb)
        return self.out(x)


# ---- EDM's block, its ADM, DDPM++ and NCSN++


def box(taps):
    f = torch.tensor(taps, dtype=torch.float32)
    return (f[:, None] * f / f.sum() ** 2)[None, None]


class EdmConv(nn.Module):
    """Convolution after (or, `fused`, before) resampling; with `kernel` 0 the latter alone."""

    def __init__(self, cin, cout, kernel, move="", taps=(1, 1), fused=False):
        super().__init__()
        self.move, self.fused, self.pad = move, fused, kernel // 2
        if kernel:
            self.weight = nn.Parameter(
                torch.randn(cout, cin, kernel, kernel) / math.sqrt(cin) / kernel
            )
            self.bias = nn.Parameter(torch.zeros(cout))
        self.register_buffer("resample_filter", box(taps) if move else None)

    def forward(self, x):
        f, c = self.resample_filter, x.shape[1]
        if self.fused:
            pad = (f.shape[-1] - 1) // 2
            x = F.conv2d(x, self.weight, padding=self.pad + pad)
            x = F.conv2d(x, f.repeat(x.shape[1], 1, 1, 1), stride=2, groups=x.shape[1])
            return x + self.bias[:, None, None]
        if self.move:
            pad = (f.shape[-1] - 1) // 2
            window = f.repeat(c, 1, 1, 1)
            if self.move == "down":
                x = F.conv2d(x, window, stride=2, padding=pad, groups=c)
            else:
                x = F.conv_transpose2d(x, 4 * window, stride=2, padding=pad, groups=c)
        return (
            F.conv2d(x, self.weight, self.bias, padding=self.pad) if hasattr(self, "weight") else x
        )


class EdmBlock(nn.Module):
    def __init__(
        self,
        cin,
        cout,
        emb,
        move="",
        heads=0,
        film=True,
        scale=1.0,
        eps=1e-5,
        taps=(1, 1),
        project=False,
    ):
        super().__init__()
        self.heads, self.film, self.scale = heads, film, scale
        norm = lambda c: nn.GroupNorm(min(32, c // 4), c, eps=eps)  # noqa: E731
        self.norm0, self.conv0 = norm(cin), EdmConv(cin, cout, 3, move, taps)
        self.affine = nn.Linear(emb, cout * (2 if film else 1))
        self.norm1, self.conv1 = norm(cout), EdmConv(cout, cout, 3)
        if cin != cout or move:
            kernel = 1 if cin != cout or project else 0
            self.skip = EdmConv(cin, cout, kernel, move, taps)
        if heads:
            self.norm2, self.qkv = norm(cout), EdmConv(cout, 3 * cout, 1)
            self.proj = EdmConv(cout, cout, 1)

    def forward(self, x, emb):
        y = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, 1)
            y = F.silu(self.norm1(y) * (1 + scale) + shift)
        else:
            y = F.silu(self.norm1(y + e))
        x = (self.conv1(y) + (self.skip(x) if hasattr(self, "skip") else x)) * self.scale
        if not self.heads:
            return x
        b, c, *_ = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(b * self.heads, c // self.heads, 3, -1)
        q, k, v = qkv.unbind(2)
        w = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(c // self.heads), -1)
        y = self.proj(torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape))
        return (x + y) * self.scale


class EdmUNet(nn.Module):
    """`song` None gives ADM; else a dict(taps, fourier, residual) gives DDPM++ and NCSN++."""

    def __init__(
        self,
        size,
        channels,
        mult,
        blocks,
        attended,
        cin,
        cout,
        classes=0,
        song=None,
        head_channels=64,
    ):
        super().__init__()
        self.channels, self.song = channels, song
        emb, options = 4 * channels, {}
        width = channels * (song["noise_mult"] if song else 1)
        if song:
            options = {
                "film": False,
                "scale": math.sqrt(0.5),
                "eps": 1e-6,
                "taps": song["taps"],
                "project": True,
            }
        if song and song["fourier"]:
            self.register_buffer("freqs", torch.randn(width // 2) * 16)
        self.width = width
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.classes = classes
        if classes:
            self.map_label = nn.Linear(classes, width if song else emb, bias=bool(song))

        def heads(c, yes):
            return (1 if song else c // head_channels) if yes else 0

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, caux, skips = cin, cin, []
        for level, m in enumerate(mult):
            r = size >> level
            if level == 0:
                c = channels if song else channels * m
                self.enc[f"{r}x{r}_conv"] = EdmConv(cin, c, 3)
            else:
                self.enc[f"{r}x{r}_down"] = EdmBlock(c, c, emb, "down", **options)
                if song and song["residual"]:
                    self.enc[f"{r}x{r}_aux"] = EdmConv(caux, c, 3, "down", song["taps"], fused=True)
                    caux = c
            skips.append(c)
            for i in range(blocks):
                block = EdmBlock(
                    c, channels * m, emb, heads=heads(channels * m, r in attended), **options
                )
                self.enc[f"{r}x{r}_block{i}"] = block
                c = channels * m
                skips.append(c)
        for level, m in reversed(list(enumerate(mult))):
            r = size >> level
            if level == len(mult) - 1:
                self.dec[f"{r}x{r}_in0"] = EdmBlock(c, c, emb, heads=heads(c, True), **options)
                self.dec[f"{r}x{r}_in1"] = EdmBlock(c, c, emb, **options)
            else:
                self.dec[f"{r}x{r}_up"] = EdmBlock(c, c, emb, "up", **options)
            for i in range(blocks + 1):
                yes = r in attended and (not song or i == blocks)
                self.dec[f"{r}x{r}_block{i}"] = EdmBlock(
                    c + skips.pop(), channels * m, emb, heads=heads(channels * m, yes), **options
                )
                c = channels * m
        self.out_norm = nn.GroupNorm(min(32, c // 4), c, eps=1e-6 if song else 1e-5)
        self.out_conv = EdmConv(c, cout, 3)

    def forward(self, x, t, y=None):
        if self.song and self.song["fourier"]:
            angles = t[:, None] * 2 * math.pi * self.freqs
            emb = torch.cat([angles.sin(), angles.cos()], 1)
        else:
            emb = waves(t, self.width, endpoint=bool(self.song), sin_first=bool(self.song))
        one_hot = None if y is None else F.one_hot(y, self.classes).float()
        if self.song:
            if y is not None:
                emb = emb + self.map_label(one_hot * math.sqrt(self.classes))
            emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        else:
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            emb = F.silu(emb if y is None else emb + self.map_label(one_hot))
        skips, aux = [], x
        for name, block in self.enc.items():
            if name.endswith("aux"):
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
                continue
            x = block(x, emb) if isinstance(block, EdmBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
