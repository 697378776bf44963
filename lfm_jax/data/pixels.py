"""From stored images to uint8 arrays of one size: decode, crop, pad, channels.

The crop is the one that ADM introduced and DiT, SiT and MAR kept, so that latents are comparable:
halve with a box filter while the short side is at least twice the target, resize the short side to
the target with a bicubic filter, cut the central square.
"""

import dataclasses
import io
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lfm_jax.errors import UserError

# A 100-megapixel PNG of zeros is a few kilobytes on disk and 300 MB in memory.
MAX_PIXELS = 64_000_000
FITS = ("crop", "pad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How every image of a source is brought to one shape.

    Attributes:
        image_size: side in pixels; 0 keeps the stored size.
        channels: 1 (ITU-R 601 luma) or 3 (gray is repeated; alpha is dropped).
        fit: "crop" (resize the short side, cut the central square) or "pad" (zeros around the
            image, for MNIST-like 28 -> 32).
        max_pixels: a stored image with more is refused before it is decoded.
    """

    image_size: int = 0
    channels: int = 3
    fit: str = "crop"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise UserError(f"channels={self.channels}: expected 1 or 3")
        if self.image_size < 0:
            raise UserError(f"image_size={self.image_size}: expected a side in pixels, or 0")
        if self.fit not in FITS:
            raise UserError(f"fit={self.fit!r}: expected one of {', '.join(FITS)}")

    def spec(self) -> dict[str, Any]:
        """What the delivered pixels depend on, as JSON: part of a source's fingerprint."""
        return {"image_size": self.image_size, "channels": self.channels, "fit": self.fit}

    def encoded(self, data: bytes, where: str) -> UInt8[np.ndarray, "h w c"]:
        """Decode one PNG, JPEG, WebP, ...; `where` names it in errors.

        Of 16-bit gray the high byte is kept. Whole numbers of 32 bits are read as the 8- or 16-bit
        gray that they hold.

        Raises:
            UserError: not an image, damaged, larger than `max_pixels`, or of floats or larger whole
                numbers, whose black and white are not known.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise UserError(
                        f"{where}: {width}x{height} pixels; at most {self.max_pixels} accepted"
                    )
                image.load()
                array = _to_channels(image, self.channels, where)
        except UserError:
            raise
        except Image.DecompressionBombError as error:
            raise UserError(f"{where}: {error}; at most {self.max_pixels} accepted") from None
        # Pillow's plugins raise nearly anything on damaged files.
        except Exception as error:
            raise UserError(
                f"{where}: not a readable image ({error}); expected PNG, JPEG, WebP, ..."
            ) from None
        return self.array(array, where)

    def array(self, image: UInt8[np.ndarray, "..."], where: str) -> UInt8[np.ndarray, "h w c"]:
        """Bring one ``[h, w]`` or ``[h, w, 1|3]`` array to the wanted shape."""
        image = self._channels(image, where)
        if not self.image_size or image.shape[:2] == (self.image_size, self.image_size):
            return image
        if self.fit == "pad":
            return _pad(image[None], self.image_size, where)[0]
        # A line of pixels is small until its short side has been brought to size.
        long, short = max(image.shape[:2]), min(image.shape[:2])
        if not short or self.image_size * self.image_size * long > self.max_pixels * short:
            raise UserError(
                f"{where}: {image.shape[1]}x{image.shape[0]} pixels grow beyond "
                f"{self.max_pixels} at image_size={self.image_size}; expected a less narrow image"
            )
        return center_crop(image, self.image_size)

    def arrays(
        self, images: UInt8[np.ndarray, "n ..."], where: str
    ) -> UInt8[np.ndarray, "n h w c"]:
        """`array` over a stack of equally sized images, without a Python loop where possible."""
        images = self._channels(images, where, stacked=True)
        size = self.image_size
        if not size or images.shape[1:3] == (size, size) or not len(images):
            return images
        if self.fit == "pad":
            return _pad(images, size, where)
        return np.stack([center_crop(image, size) for image in images])

    def _channels(self, image: np.ndarray, where: str, stacked: bool = False) -> np.ndarray:
        if image.ndim == 2 + stacked:
            image = image[..., None]
        if image.ndim != 3 + stacked or image.shape[-1] not in (1, 3):
            raise UserError(
                f"{where}: array of shape {image.shape}; expected [h, w] or [h, w, 1|3]"
            )
        if image.shape[-1] == self.channels:
            return image
        if self.channels == 3:
            return np.repeat(image, 3, axis=-1)
        # Pillow's integer luma, so that arrays and files convert alike.
        luma = image.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def center_crop(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "s s c"]:
    """ADM's crop: the central square of side `size` after box halvings and one bicubic resize.

    Smaller images are enlarged. Source: Dhariwal & Nichol 2021 (preprocessing of ImageNet).
    """
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    ratio = size / min(picture.size)
    width, height = (round(side * ratio) for side in picture.size)
    picture = picture.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = np.asarray(picture)[top : top + size, left : left + size]
    return np.ascontiguousarray(cropped.reshape(size, size, image.shape[-1]))


def _pad(images: np.ndarray, size: int, where: str) -> np.ndarray:
    height, width = images.shape[1:3]
    if max(height, width) > size:
        raise UserError(
            f"{where}: image of {height}x{width} does not fit image_size={size}; "
            "expected a larger image_size, or fit='crop'"
        )
    top, left = (size - height) // 2, (size - width) // 2
    padding = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
    return np.pad(images, padding)


def _to_channels(image: Any, channels: int, where: str) -> np.ndarray:
    # Of these modes Pillow clips the values at 0 and 255: floats in [0, 1] would be black.
    if image.mode == "F":
        raise UserError(f"{where}: mode F (floats); expected an image of 8 or 16 bits")
    if not image.mode.startswith("I"):
        return np.array(image.convert("L" if channels == 1 else "RGB"))
    gray = np.asarray(image)
    low, high = int(gray.min()), int(gray.max())
    if low < 0 or high > 0xFFFF:
        raise UserError(
            f"{where}: mode {image.mode} (whole numbers) with values from {low} to {high}; "
            "expected an image of 8 or 16 bits"
        )
    # Mode I is 32 bits in TIFF; Pillow uses it for 16 bits too, in PGM and, by version, in PNG.
    deep = image.mode != "I" or image.format in ("PNG", "PPM") or high > 0xFF
    gray = (gray >> 8 if deep else gray).astype(np.uint8)
    return np.repeat(gray[..., None], channels, axis=-1)
