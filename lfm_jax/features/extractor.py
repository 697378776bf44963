"""The one interface between images and features: bytes in, named arrays out.

An extractor is a frozen pytree: `params` are its leaves, everything else is static, so a jitted
function that takes one compiles once per architecture and not once per set of weights. What happens
to the pixels before the network (the resize rule, the crop, the affine map to the network's scale)
is part of the extractor, because two numbers are comparable only if it is the same.

Your own network is one Linen module returning ``{"features": [b, d], ...}`` and one call::

    Extractor(params=params, model=MyNet(), name="my-net", dim=512, input_size=224,
              resize="clean", mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
"""

import hashlib
import json
import os
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from etils import epath
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float, Num

from lfm_jax.errors import UserError
from lfm_jax.features.resize import center_crop, resize
from lfm_jax.slicing import apply_sliced
from lfm_jax.writers import write_bytes

_LARGE = 128  # side of an image whose feature maps fill a CPU's cache


@flax.struct.dataclass
class Extractor:
    """A feature network with the rule by which bytes reach it.

    Attributes:
        params: the network's parameters (nested dict, float32).
        model: Linen module, ``model.apply({"params": p}, x) -> {"features": [b, d], ...}``;
            optional entries: ``"logits" [b, k]`` and ``"spatial" [b, d']`` (sFID is of these).
        name: what reports call it; the feature space of an ``FD-<name>``.
        dim: d, the width of ``"features"``.
        input_size: side of the square that the network sees, pixels.
        channels: colour channels that it sees; one-channel images are repeated to three.
        resize: rule of `lfm_jax.features.resize`, or ``"none"`` where the size must match already.
        crop: the shorter side is resized and the centre cut out; otherwise aspect is not kept.
        mean, std: per channel, in bytes: the network sees ``(pixels - mean) / std``.
    """

    params: Any
    model: nn.Module = flax.struct.field(pytree_node=False)
    name: str = flax.struct.field(pytree_node=False)
    dim: int = flax.struct.field(pytree_node=False)
    input_size: int = flax.struct.field(pytree_node=False)
    channels: int = flax.struct.field(pytree_node=False, default=3)
    resize: str = flax.struct.field(pytree_node=False, default="none")
    crop: bool = flax.struct.field(pytree_node=False, default=False)
    mean: tuple[float, ...] = flax.struct.field(pytree_node=False, default=(127.5,))
    std: tuple[float, ...] = flax.struct.field(pytree_node=False, default=(127.5,))

    def __call__(self, images: Num[Array | np.ndarray, "b h w c"]) -> dict[str, Array]:
        """Features of `images`, uint8 ``[b, h, w, c]`` with 1 or 3 channels.

        Raises `UserError` for any other dtype: floats have no agreed range, see `embed`.
        """
        if images.dtype != jnp.uint8:
            raise UserError(
                f"images of {self.name}: dtype {images.dtype}; accepted: uint8 in [0, 255]"
            )
        # On a CPU the feature maps of one large image fit into the cache, those of a batch do not.
        alone = jax.default_backend() == "cpu" and self.input_size >= _LARGE
        size = jax.device_count() if alone else len(images)
        return apply_sliced(
            lambda x: self.embed(jnp.asarray(x).astype(jnp.float32)),
            images,
            slice_size=max(size, 1),
        )

    def embed(self, pixels: Float[Array, "b h w c"]) -> dict[str, Array]:
        """The same from float pixels on the byte scale [0, 255], unrounded: differentiable.

        Runs at the highest matmul precision whatever the backend's default: TF32 or bf16 products
        move a Frechet distance by more than the differences that papers report.
        """
        with jax.default_matmul_precision("highest"):
            out = self.model.apply({"params": self.params}, self.prepare(pixels))
        return cast(dict[str, Array], out)

    def prepare(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b s s k"]:
        """Crop, resize and scale `pixels` (floats in [0, 255]) into what the network sees."""
        if pixels.shape[-1] != self.channels:
            if pixels.shape[-1] != 1:
                raise UserError(
                    f"images of {self.name}: {pixels.shape[-1]} channels; "
                    f"accepted: {self.channels} or 1"
                )
            pixels = jnp.repeat(pixels, self.channels, axis=-1)
        size = self.input_size
        if self.resize == "none":
            if pixels.shape[1:3] != (size, size):
                raise UserError(
                    f"images of {self.name}: {pixels.shape[1]}x{pixels.shape[2]} pixels; "
                    f"accepted: {size}x{size}"
                )
        elif self.crop:
            pixels = center_crop(pixels, size, rule=self.resize)
        else:
            pixels = resize(pixels, (size, size), rule=self.resize)
        return (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    @property
    def pipeline(self) -> str:
        """One line that says what was done to the pixels; equal lines are comparable."""
        crop = "crop " if self.crop else ""
        mean, std = (",".join(f"{v:g}" for v in t) for t in (self.mean, self.std))
        return f"{self.name}: {crop}{self.resize} {self.input_size}, (x-{mean})/{std}"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the parameters' names and values: which weights judged."""
        digest = hashlib.sha256()
        for path, leaf in sorted(_flatten(self.params).items()):
            digest.update(path.encode())
            digest.update(leaf.tobytes())
        return digest.hexdigest()


def _flatten(params) -> dict[str, np.ndarray]:
    return {"/".join(k): np.asarray(v) for k, v in traverse_util.flatten_dict(params).items()}


def write_params(path: str | os.PathLike, params, metadata: dict) -> None:
    """Write `params` to a safetensors file, `metadata` (JSON) in its header, all or nothing."""
    tensors = {k: jnp.asarray(v) for k, v in _flatten(params).items()}
    data = safetensors.flax.save(tensors, metadata={"lfm_jax": json.dumps(metadata)})
    write_bytes(path, data)


def read_params(path: str | os.PathLike) -> tuple[dict, dict]:
    """``(params, metadata)`` of a file of `write_params`; `UserError` if it is not one."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(
            f"extractor {path}: no such file; accepted: a .safetensors of save_extractor"
        )
    data = path.read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lfm_jax"])
        tensors = safetensors.flax.load(data)
        params = traverse_util.unflatten_dict({tuple(k.split("/")): v for k, v in tensors.items()})
    except Exception as error:  # of JSON, of the format, of jax for what it has no dtype for
        raise UserError(
            f"extractor {path}: not readable ({type(error).__name__}); "
            "accepted: a .safetensors of save_extractor"
        ) from error
    if not isinstance(metadata, dict):
        raise UserError(f"extractor {path}: its metadata is no record; train it again")
    return params, metadata
