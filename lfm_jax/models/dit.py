"""DiT: a transformer on patches of the latent, steered by adaLN-Zero (Peebles & Xie, 2212.09748).

A block with condition vector ``c = time(t) + label(y)``, ``(b1, s1, g1, b2, s2, g2) = W silu(c)``:

    x <- x + g1 * attention((1 + s1) LN(x) + b1)
    x <- x + cross_attention(LN(x), tokens)          (only with `context_dim`)
    x <- x + g2 * mlp((1 + s2) LN(x) + b2)

W and the output layer start at zero, so that each block starts as the identity and the network as
the zero velocity. The position table is fixed and computed (`layers.position_table`).

Parameters of all blocks are stacked ``[depth, ...]`` under ``blocks``, whether they are scanned
(`scan_blocks`: compile time independent of the depth) or unrolled (XLA may fuse across blocks).
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import normal, zeros
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.models import layers
from lfm_jax.models.backbone import Backbone
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.taps import Taps

# name -> (hidden, depth, heads): table 1 of the paper
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PATCHES = (2, 4, 8)
TIME_DIM = 256


class Block(nn.Module):
    """One transformer block; see the module's docstring for the equation."""

    heads: int
    mlp_ratio: float
    context: bool
    attention: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        c: Float[Array, "b d"],
        tokens: Float[Array, "b n k"] | None = None,
    ) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        head = (self.heads, d // self.heads)

        def dense(features: int, name: str, **options) -> layers.Dense:
            return layers.Dense(features, dtype=self.dtype, name=name, **options)

        # One product for all six vectors; c has been through the SiLU (once, not per block).
        steering = jnp.split(dense(6 * d, "modulation", init=zeros)(c), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = steering

        y = layers.modulate(layers.layer_norm(x), shift1, scale1)
        q, k, v = jnp.split(dense(3 * d, "qkv")(y), 3, axis=-1)
        q, k, v = (z.reshape(b, t, *head) for z in (q, k, v))
        y = layers.attention(q, k, v, backend=self.attention).reshape(b, t, d)
        x = x + gate1[:, None] * dense(d, "attention_out")(y)

        if self.context:
            assert tokens is not None  # the network has looked
            q = dense(d, "cross_q")(layers.layer_norm(x)).reshape(b, t, *head)
            k, v = jnp.split(dense(2 * d, "cross_kv")(tokens), 2, axis=-1)
            k, v = (z.reshape(b, -1, *head) for z in (k, v))
            y = layers.attention(q, k, v, backend=self.attention).reshape(b, t, d)
            x = x + dense(d, "cross_out", init=zeros)(y)

        y = layers.modulate(layers.layer_norm(x), shift2, scale2)
        y = layers.gelu(dense(int(d * self.mlp_ratio), "mlp_in")(y))
        return x + gate2[:, None] * dense(d, "mlp_out")(y)


class DiT(Backbone):
    """The network; its common fields are `Backbone`'s.

    With `num_classes` > 0 the label table has one row more, for the null label: it is kept even
    when labels are never dropped, so that guidance and further training stay possible.

    Attributes:
        hidden, depth, heads, patch, mlp_ratio: the size; see `SIZES`.
        null_row: keep a table of the null row alone when `num_classes` is 0: what LFM's
            unconditional networks carry.
        context_dim: width of ``cond.tokens`` for cross-attention in each block; 0 for none.
        time_endpoint: frequencies end at 1e-4 exactly (diffusers' reading), not one step above.
        scan_blocks: scan over the blocks or unroll them; parameters are the same.
    """

    hidden: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    mlp_ratio: float = 4.0
    null_row: bool = False
    context_dim: int = 0
    time_endpoint: bool = False
    scan_blocks: bool = True

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the hidden states: ``block_i`` is the output ``[b, t, d]`` of block i."""
        return tuple(f"block_{i:02d}" for i in range(self.depth))

    @nn.compact
    def _network(
        self, x: Array, t: Array, cond: Cond, train: bool, taps: Taps, out_channels: int
    ) -> Array:
        self._check(x, cond)
        grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
        tokens = layers.patchify(x, self.patch)
        tokens = layers.Dense(self.hidden, dtype=self.dtype, name="patch")(tokens)
        tokens = tokens + layers.position_table(*grid, self.hidden).astype(self.dtype)

        c = nn.silu(self._condition(t, cond)).astype(self.dtype)
        tokens = self._trunk(tokens, c, cond.tokens if self.context_dim else None, taps)

        final = layers.Dense(2 * self.hidden, init=zeros, dtype=self.dtype, name="final_modulation")
        tokens = layers.modulate(layers.layer_norm(tokens), *jnp.split(final(c), 2, axis=-1))
        head = layers.Dense(
            self.patch**2 * out_channels, init=zeros, dtype=self.dtype, name="final_out"
        )
        return layers.unpatchify(head(tokens).astype(jnp.float32), self.patch, grid)

    def _check(self, x: Array, cond: Cond) -> None:
        layers.check_attention(self.attention)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UserError(
                f"patch: {self.patch} does not divide the latent's sides {x.shape[1]}x{x.shape[2]}"
            )
        if self.hidden % self.heads:
            raise UserError(f"heads: {self.heads} does not divide hidden={self.hidden}")
        if self.context_dim and cond.tokens is None:
            raise UserError("cond.tokens: this network (context_dim > 0) needs context tokens")

    def _condition(self, t: Array, cond: Cond) -> Float[Array, "b d"]:
        """Time plus label, in float32: it is tiny, and rounding it shifts the whole image."""
        c = layers.sinusoid(t * self.time_scale, TIME_DIM, endpoint=self.time_endpoint)
        c = layers.Dense(self.hidden, init=normal(0.02), name="time_in")(c)
        c = layers.Dense(self.hidden, init=normal(0.02), name="time_out")(nn.silu(c))
        if self.num_classes or self.null_row:
            rows = nn.Embed(
                self.num_classes + 1, self.hidden, embedding_init=normal(0.02), name="labels"
            )
            if cond.label is None or not self.num_classes:
                label = jnp.full(t.shape, self.num_classes)
            else:
                label = cond.label
            c = c + rows(label)
        return c

    def _trunk(
        self, x: Float[Array, "b t d"], c: Float[Array, "b d"], tokens: Array | None, taps: Taps
    ) -> Float[Array, "b t d"]:
        """All blocks, cut only where a tap is active."""
        block = Block(
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            context=self.context_dim > 0,
            attention=self.attention,
            dtype=self.dtype,
            parent=None,
        )

        def init(key: Array) -> Any:
            keys = jax.random.split(key, self.depth)
            return jax.vmap(lambda k: block.init(k, x, c, tokens)["params"])(keys)

        def step(x: Array, params: dict) -> Array:
            return cast(Array, block.apply({"params": params}, x, c, tokens))

        stacked = self.param("blocks", init)
        step = layers.remat(step, self.remat, prevent_cse=not self.scan_blocks)
        if not self.scan_blocks:
            for name, params in zip(self.taps, unstack(stacked, self.depth), strict=True):
                x = taps(name, step(x, params))
            return x
        start = 0
        for stop, name in enumerate(self.taps, start=1):
            if taps.active(name) or stop == self.depth:
                part = stacked
                if (start, stop) != (0, self.depth):
                    part = jax.tree.map(lambda p, a=start, b=stop: p[a:b], stacked)
                x, _ = jax.lax.scan(lambda x, params: (step(x, params), None), x, part)
                x = taps(name, x)
                start = stop
        return x


def unstack(stacked: dict, depth: int) -> list[dict]:
    """Parameters of each block from the stacked ones.

    `jax.lax.split` and not indexing, because its transpose is one concatenation where that of
    `depth` slices is a sum of `depth` padded arrays of full size.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    parts = [[p.squeeze(0) for p in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return [jax.tree.unflatten(treedef, part) for part in zip(*parts, strict=True)]


def forward_macs(model: DiT, latent_shape: tuple[int, int, int], in_channels: int = 0) -> int:
    """Multiply-adds of one forward pass of one image, closed form.

    ``L (12 T d^2 + 2 T^2 d + 6 d^2) + T d p^2 (c_in + c_out)`` with mlp_ratio 4; the label lookup,
    the time MLP and the final modulation are left out as in the literature (0.01 %).
    """
    h, w, channels = latent_shape
    tokens, d = h * w // model.patch**2, model.hidden
    block = int((4 + 2 * model.mlp_ratio) * tokens * d * d) + 2 * tokens**2 * d + 6 * d * d
    ends = (in_channels or channels) + (model.out_channels or channels)
    return model.depth * block + tokens * d * model.patch**2 * ends
