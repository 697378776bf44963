"""From a network's floats to the bytes that are judged: the rule is part of the figure.

Published pipelines differ here by up to one level a pixel, which moves a FID of 2 in the second
digit.
"""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from lfm_jax.errors import UserError

UINT8_RULES = {
    # (x + 1) * 127.5 rounded: this project's samples, and its inverse of x / 127.5 - 1.
    "round": lambda x: np.round(np.clip((x + 1) * 127.5, 0, 255)),
    # 127.5 x + 128 cut off: ADM, DiT and SiT.
    "truncate": lambda x: np.clip(127.5 * x + 128, 0, 255),
    # 255 (x + 1) / 2 cut off: REPA, flow_matching.
    "floor": lambda x: np.clip(255 * (x + 1) / 2, 0, 255),
}


def to_bytes(images: Float[np.ndarray, "*s"], *, rule: str = "round") -> UInt8[np.ndarray, "*s"]:
    """Floats on [-1, 1] as bytes by one of `UINT8_RULES`; `UserError` for another rule."""
    if rule not in UINT8_RULES:
        raise UserError(f"evaluate.uint8_rule: {rule!r}; accepted: {', '.join(UINT8_RULES)}")
    return UINT8_RULES[rule](np.asarray(images, np.float32)).astype(np.uint8)


def jpeg_round_trip(
    images: UInt8[np.ndarray, "n h w c"], *, quality: int = 75
) -> UInt8[np.ndarray, "n h w c"]:
    """`images` written as JPEG and read again, the way LFM's samples reached its FID.

    Quality 75 with 4:2:0 chroma is Pillow's default and so torchvision's ``save_image``'s.
    """
    result = np.empty_like(images)
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        gray = image.shape[-1] == 1
        Image.fromarray(image[..., 0] if gray else image).save(buffer, "JPEG", quality=quality)
        decoded = np.asarray(Image.open(buffer))
        result[i] = decoded[..., None] if gray else decoded
    return result
