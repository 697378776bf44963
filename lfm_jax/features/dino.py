"""DINOv2 ViT-L/14 (Oquab et al., 2023): the features of FD-DINOv2 (Stein et al., 2023).

The features are the normalised class token. The network was trained at 518 pixels and judges at
224, so its 37 x 37 positions are resampled to 16 x 16 once, when the file is read: torch's bicubic
(a = -3/4, not antialiased) at scale ``(16 + offset) / 37``. The published hub code has an offset of
0.1, and EDM2's FD-DINOv2 inherits it; transformers has none. Bytes: antialiased bicubic to 224,
ImageNet's mean.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lfm_jax.features import weights
from lfm_jax.features.extractor import Extractor
from lfm_jax.features.vit import VisionTransformer

PUBLISHED = weights.Published(
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
)
MEAN = tuple(255 * v for v in (0.485, 0.456, 0.406))
STD = tuple(255 * v for v in (0.229, 0.224, 0.225))
# Names of transformers, old and new, in terms of the hub's.
RENAMES = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


class DinoV2(nn.Module):
    """``x [b, s, s, 3]`` -> ``{"features": [b, width]}``, the normalised class token."""

    tower: VisionTransformer

    def __call__(self, x: Float[Array, "b s s 3"]) -> dict[str, Array]:
        return {"features": self.tower(x)[:, 0]}


def from_torch(
    tensors: dict, *, size: int = 224, offset: float = 0.1, heads: int = 0
) -> tuple[DinoV2, dict]:
    """``(model, params)`` of a DINOv2 state dict, the hub's names or transformers'.

    Args:
        size: input side, pixels; a multiple of the patch.
        offset: of the position table's scale: 0.1 as the hub, 0 as transformers.
        heads: 0 takes the family's rule of 64 channels a head.

    Raises:
        UserError: it is not such a state dict.
    """
    tensors = {_rename(k): v for k, v in tensors.items()}
    names = ("patch_embed.proj.weight", "pos_embed", "norm.weight", "blocks.0.ls1.gamma")
    weights.require(tensors, dict.fromkeys(names), "DINOv2")
    embed = tensors["patch_embed.proj.weight"]
    width, patch = embed.shape[0], embed.shape[-1]
    depth = len(weights.block_numbers(tensors, r"blocks\.(\d+)\."))
    tower = {
        "patch_embed": {
            "kernel": weights.conv_kernel(embed),
            "bias": tensors["patch_embed.proj.bias"],
        },
        "class_token": tensors["cls_token"],
        "position": _positions(tensors["pos_embed"], size // patch, offset),
        "norm": weights.layer_norm(tensors, "norm"),
    }
    for i in range(depth):
        at, to = f"blocks.{i}", f"block{i}"
        if f"{at}.attn.qkv.weight" in tensors:
            qkv = weights.dense(tensors, f"{at}.attn.qkv")
        else:
            parts = [weights.dense(tensors, f"{at}.attn.{n}") for n in "qkv"]
            qkv = {k: np.concatenate([p[k] for p in parts], -1) for k in parts[0]}
        tower |= {
            f"{to}_norm1": weights.layer_norm(tensors, f"{at}.norm1"),
            f"{to}_norm2": weights.layer_norm(tensors, f"{at}.norm2"),
            f"{to}_qkv": qkv,
            f"{to}_out": weights.dense(tensors, f"{at}.attn.proj"),
            f"{to}_up": weights.dense(tensors, f"{at}.mlp.fc1"),
            f"{to}_down": weights.dense(tensors, f"{at}.mlp.fc2"),
            f"scale{i}_attention": tensors[f"{at}.ls1.gamma"],
            f"scale{i}_mlp": tensors[f"{at}.ls2.gamma"],
        }
    model = DinoV2(
        VisionTransformer(
            patch=patch,
            width=width,
            depth=depth,
            heads=heads or width // 64,
            mlp=tower["block0_up"]["kernel"].shape[1],
            layer_scale=True,
            epsilon=1e-6,
        )
    )
    return model, {"tower": tower}


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _positions(table: np.ndarray, side: int, offset: float) -> np.ndarray:
    """The position table ``[1, 1 + n^2, d]`` resampled to ``[1, 1 + side^2, d]``."""
    grid = table[0, 1:].astype(np.float64)
    old = round(len(grid) ** 0.5)
    if old == side:
        return table
    matrix = _bicubic_matrix(old, side, (side + offset) / old)
    grid = grid.reshape(old, old, -1)
    grid = np.einsum("ui,vj,ijd->uvd", matrix, matrix, grid).reshape(1, side * side, -1)
    return np.concatenate([table[:, :1], grid.astype(table.dtype)], 1)


def _bicubic_matrix(size_in: int, size_out: int, scale: float) -> np.ndarray:
    """Torch's bicubic, not antialiased: 4 taps about ``(i + 1/2)/scale - 1/2``, edges repeated."""
    a = -0.75
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        position = (i + 0.5) / scale - 0.5
        base = int(np.floor(position))
        for tap in range(base - 1, base + 3):
            x = abs(position - tap)
            inner = ((a + 2) * x - (a + 3)) * x * x + 1
            outer = ((x - 5) * x + 8) * x * a - 4 * a
            matrix[i, min(max(tap, 0), size_in - 1)] += inner if x < 1 else outer
    return matrix


def dino(path: str | os.PathLike = "", *, resize: str = "bicubic", heads: int = 0) -> Extractor:
    """The DINOv2 extractor of `path`, or of the published ViT-L/14 fetched once.

    Raises `UserError` if the file is missing or is not DINOv2.
    """
    model, params = from_torch(weights.read_tensors(weights.locate(path, PUBLISHED)), heads=heads)
    return _make(params, model, resize)


def dino_pipeline(resize: str = "bicubic") -> str:
    """`Extractor.pipeline` of the published ViT-L/14."""
    tower = VisionTransformer(patch=14, width=1024, depth=24, heads=16, mlp=4096)
    return _make({}, DinoV2(tower), resize).pipeline


def _make(params: dict, model: DinoV2, resize: str) -> Extractor:
    tower = model.tower
    return Extractor(
        params=jax.tree.map(jnp.asarray, params),
        model=model,
        name=f"DINOv2-ViT-{tower.width}/{tower.patch}",
        dim=tower.width,
        input_size=224,
        resize=resize,
        mean=MEAN,
        std=STD,
    )
