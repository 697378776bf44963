"""CLIP's image tower (Radford et al., 2021): the features of CLIP-FID and CMMD.

ViT-B/32 unless the file holds another: patch, width, depth and input size are read off the tensors.
The features are the projected class token, not normalised; CMMD normalises them itself. Bytes reach
the network as in clean-fid: shorter side to 224 by antialiased bicubic, centre crop, CLIP's mean
and deviation (clean-fid rounds to bytes in between, which moves a pixel by at most one level).
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lfm_jax.features import weights
from lfm_jax.features.extractor import Extractor
from lfm_jax.features.vit import VisionTransformer

PUBLISHED = weights.Published(
    url="https://huggingface.co/openai/clip-vit-base-patch32/resolve/main/pytorch_model.bin",
    file="clip-vit-base-patch32.bin",
)
MEAN = tuple(255 * v for v in (0.48145466, 0.4578275, 0.40821073))
STD = tuple(255 * v for v in (0.26862954, 0.26130258, 0.27577711))


class ClipVision(nn.Module):
    """``x [b, s, s, 3]`` -> ``{"features": [b, dim]}``, the projected class token."""

    tower: VisionTransformer
    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s s 3"]) -> dict[str, Array]:
        tokens = self.tower(x)
        return {"features": nn.Dense(self.dim, use_bias=False, name="projection")(tokens[:, 0])}


def from_torch(tensors: dict, *, heads: int = 0) -> tuple[ClipVision, dict, int]:
    """``(model, params, input size)`` of a CLIP state dict under transformers' names.

    Text tensors are ignored. `heads` 0 takes CLIP's rule of 64 channels a head. Raises `UserError`
    if it is not such a state dict.
    """
    tensors = {k.removeprefix("vision_model."): v for k, v in tensors.items()}
    names = ("embeddings.patch_embedding.weight", "visual_projection.weight")
    weights.require(tensors, dict.fromkeys(names), "CLIP")
    embed = tensors["embeddings.patch_embedding.weight"]
    width, patch = embed.shape[0], embed.shape[-1]
    positions = tensors["embeddings.position_embedding.weight"]
    depth = len(weights.block_numbers(tensors, r"encoder\.layers\.(\d+)\."))
    tower = {
        "patch_embed": {"kernel": weights.conv_kernel(embed)},
        "class_token": tensors["embeddings.class_embedding"].reshape(1, 1, width),
        "position": positions[None],
        "pre_norm": weights.layer_norm(tensors, "pre_layrnorm"),
        "norm": weights.layer_norm(tensors, "post_layernorm"),
    }
    for i in range(depth):
        at, to = f"encoder.layers.{i}", f"block{i}"
        qkv = [weights.dense(tensors, f"{at}.self_attn.{n}_proj") for n in "qkv"]
        tower |= {
            f"{to}_norm1": weights.layer_norm(tensors, f"{at}.layer_norm1"),
            f"{to}_norm2": weights.layer_norm(tensors, f"{at}.layer_norm2"),
            f"{to}_qkv": {k: np.concatenate([p[k] for p in qkv], -1) for k in qkv[0]},
            f"{to}_out": weights.dense(tensors, f"{at}.self_attn.out_proj"),
            f"{to}_up": weights.dense(tensors, f"{at}.mlp.fc1"),
            f"{to}_down": weights.dense(tensors, f"{at}.mlp.fc2"),
        }
    projection = tensors["visual_projection.weight"].T
    model = ClipVision(
        VisionTransformer(
            patch=patch,
            width=width,
            depth=depth,
            heads=heads or width // 64,
            mlp=tower["block0_up"]["kernel"].shape[1],
            quick=True,
            pre_norm=True,
            patch_bias=False,
        ),
        dim=projection.shape[1],
    )
    side = round((len(positions) - 1) ** 0.5)
    return model, {"tower": tower, "projection": {"kernel": projection}}, side * patch


def clip(path: str | os.PathLike = "", *, resize: str = "clean", heads: int = 0) -> Extractor:
    """The CLIP extractor of `path`, or of the published ViT-B/32 fetched once.

    Raises `UserError` if the file is missing or is not CLIP.
    """
    tensors = weights.read_tensors(weights.locate(path, PUBLISHED))
    model, params, size = from_torch(tensors, heads=heads)
    tower = model.tower
    return Extractor(
        params=jax.tree.map(jnp.asarray, params),
        model=model,
        name=f"CLIP-ViT-{tower.width}/{tower.patch}",
        dim=model.dim,
        input_size=size,
        resize=resize,
        crop=True,
        mean=MEAN,
        std=STD,
    )
