"""Where samples and data are compared: feature maps of latents, as frozen pytrees.

    maps(latents [b, h, w, c], labels [b], keys [b]) -> {name: [b, d]}

`Decoded`         through the differentiable decoder into any `Extractor`
`BackboneTokens`  the frozen base network's own tokens at noised times (Starodubcev et al. 2025,
                  "Scale-wise Distillation", section 3.2): no decoder, no other network
`LatentMaps`      a `FeatureEncoder` trained on the latents
`RandomMaps`, `RawLatents`   the ablations that they have to beat

Real and generated latents go through one function. `Decoded` takes images too: where the data's
own images are at hand they are the better target, because the generator can then learn to make up
for what the autoencoder loses.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key, UInt8

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.features import Extractor
from lfm_jax.flow import interpolate
from lfm_jax.models.conditioning import Cond
from lfm_jax.vae import Codec

FeatureMap = Any
Rows = dict[str, Float[Array, "_ _"]]
LEAK = 0.1


def soft_clamp(x: Float[Array, "..."], leak: float = LEAK) -> Float[Array, "..."]:
    """`x` clipped to [-1, 1] exactly, with the slope `leak` outside.

    A hard clip has no slope there: a pixel that once saturates is never pulled back.
    """
    return jnp.clip(x, -1, 1) + leak * ((x - jnp.clip(x, -1, 1)) - _stopped(x))


def _stopped(x: Array) -> Array:
    return jax.lax.stop_gradient(x - jnp.clip(x, -1, 1))


@flax.struct.dataclass
class Decoded:
    """Features of the decoded image.

    Attributes:
        codec: scaled latents to images; any of `lfm_jax.vae` (a TAESD is the cheap one).
        extractor: the network; its resize rule should be antialiased where sizes differ.
        entries: which of its outputs.
        name: prefix of the rows' names.
    """

    codec: Codec
    extractor: Extractor
    entries: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("features",))
    name: str = flax.struct.field(pytree_node=False, default="decoded")

    def __call__(self, latents: Any, labels: Any, keys: Any) -> Rows:
        """Features of latents."""
        return self.of_decoded(self.codec.decode(latents))

    def of_decoded(self, images: Float[Array, "b h w c"]) -> Rows:
        """Features of decoded images, about [-1, 1]; differentiable."""
        return self._rows((soft_clamp(images) + 1) * 127.5)

    def of_images(self, images: UInt8[Array, "b h w c"]) -> Rows:
        """Features of images as they are stored."""
        return self._rows(images.astype(jnp.float32))

    def _rows(self, pixels: Array) -> Rows:
        found = self.extractor.embed(pixels)
        return {f"{self.name}/{entry}": found[entry].reshape(len(pixels), -1).astype(jnp.float32)
                for entry in self.entries}  # fmt: skip

    def check(self, image_size: int, channels: int) -> None:
        """Raises a `UserError` unless the extractor takes such images and has the entries."""
        pixels = jax.ShapeDtypeStruct((2, image_size, image_size, channels), jnp.float32)
        found = jax.eval_shape(self.extractor.embed, pixels)
        for entry in self.entries:
            if entry not in found:
                raise UserError(
                    f"features: {self.extractor.name} has no {entry!r}; it has {', '.join(found)}"
                )


@flax.struct.dataclass
class BackboneTokens:
    """Mean tokens of the frozen base network on latents noised to each of `times`.

    Attributes:
        params, model: the base network; `num_classes` its table, 0 for none.
        times: small ones: at 1 every latent looks alike.
        taps: hidden states by name.
    """

    params: Any
    model: nn.Module = flax.struct.field(pytree_node=False)
    times: tuple[float, ...] = flax.struct.field(pytree_node=False, default=(0.25,))
    taps: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    name: str = flax.struct.field(pytree_node=False, default="tokens")

    def __call__(self, latents: Any, labels: Any, keys: Any) -> Rows:
        """Mean tokens, a row a sample."""
        cond = None if labels is None else Cond(label=labels)
        rows = {}
        for i, time in enumerate(self.times):
            noise = rng.normal(jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys),
                               latents.shape[1:])  # fmt: skip
            t = jnp.full(len(latents), time)
            x = interpolate(latents, noise, t)
            out = self.model.apply({"params": self.params}, x, t, cond, capture=self.taps)
            _, hidden = cast(tuple[Array, dict[str, Array]], out)
            for tap, state in hidden.items():
                state = state.astype(jnp.float32)
                rows[f"{self.name}/{tap}@{time:g}"] = state.mean(tuple(range(1, state.ndim - 1)))
        return rows


def middle_tap(model: nn.Module) -> str:
    """The name of the hidden state in the middle of a network."""
    taps = model.taps
    return "mid" if "mid" in taps else taps[len(taps) // 2]


@flax.struct.dataclass
class LatentMaps:
    """Features of a network on the latents themselves (`FeatureEncoder`)."""

    params: Any
    model: nn.Module = flax.struct.field(pytree_node=False)
    entries: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("features", "maps"))
    name: str = flax.struct.field(pytree_node=False, default="latent")

    def __call__(self, latents: Any, labels: Any, keys: Any) -> Rows:
        """The chosen entries."""
        found = cast(dict[str, Array], self.model.apply({"params": self.params}, latents))
        return {f"{self.name}/{entry}": found[entry] for entry in self.entries}


@flax.struct.dataclass
class RawLatents:
    """The latents themselves, flattened: a baseline, not a feature space."""

    name: str = flax.struct.field(pytree_node=False, default="raw")

    def __call__(self, latents: Any, labels: Any, keys: Any) -> Rows:
        """One row a latent."""
        return {self.name: latents.reshape(len(latents), -1)}


@flax.struct.dataclass
class RandomMaps:
    """Two random convolutions, pooled: what an untrained network sees."""

    kernels: tuple[Any, Any]  # kernels [h, w, c, k]; placeholders while a pytree is rebuilt
    name: str = flax.struct.field(pytree_node=False, default="random")

    def __call__(self, latents: Any, labels: Any, keys: Any) -> Rows:
        """Mean and deviation over space of both layers' channels."""
        x, moments = latents, []
        for stride, kernel in enumerate(self.kernels, start=1):
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.gelu(x)
            moments += [x.mean((1, 2)), x.std((1, 2))]
        return {self.name: jnp.concatenate(moments, axis=-1)}


def random_maps(key: Key[Array, ""], channels: int, *, width: int = 64) -> RandomMaps:
    """`RandomMaps` of He-normal kernels."""
    first, second = jax.random.split(key)
    shapes = ((3, 3, channels, width), (3, 3, width, 2 * width))
    kernels = tuple(
        jax.random.normal(k, s) * np.sqrt(2 / np.prod(s[:3]))
        for k, s in zip((first, second), shapes, strict=True)
    )
    return RandomMaps(kernels=kernels)


def shared_leaves(
    maps: Sequence[FeatureMap],
) -> tuple[list[Any], Callable[[Sequence[Any]], list[FeatureMap]]]:
    """The arrays of `maps`, each once, and what makes the maps of them again.

    For passing maps to a compiled function: arguments are new arrays there, so that a codec that
    came along with two maps would be two, and decode twice.
    """
    leaves, structure = jax.tree.flatten(list(maps))
    once = {id(leaf): leaf for leaf in leaves}
    places = {key: place for place, key in enumerate(once)}

    def maps_of(given: Sequence[Any]) -> list[FeatureMap]:
        return structure.unflatten([given[places[id(leaf)]] for leaf in leaves])

    return list(once.values()), maps_of


def all_features(
    maps: Sequence[FeatureMap],
    latents: Float[Array, "b h w c"],
    labels: Integer[Array, " b"] | None,
    keys: Key[Array, " b"],
    images: UInt8[Array, "b H W C"] | None = None,
) -> Rows:
    """Rows of all `maps`; decoded once for all whose codecs have the same arrays, not at all where
    there are `images`.

    Inside `jax.jit` that holds for maps that are closed over; for arguments see `shared_leaves`.

    Raises:
        UserError: two maps with one name.
    """
    decoded: dict[tuple[int, ...], Array] = {}
    rows: Rows = {}
    for feature_map in maps:
        if not isinstance(feature_map, Decoded):
            found = feature_map(latents, labels, keys)
        elif images is not None:
            found = feature_map.of_images(images)
        else:
            at = tuple(map(id, jax.tree.leaves(feature_map.codec.params)))
            if at not in decoded:
                decoded[at] = feature_map.codec.decode(latents)
            found = feature_map.of_decoded(decoded[at])
        for name in found:
            if name in rows:
                raise UserError(f"features: two maps are called {name!r}")
        rows |= found
    return rows
