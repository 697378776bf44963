"""How well an autoencoder reconstructs: PSNR, SSIM, feature distance, latent statistics, a picture.

PSNR and SSIM are means over images of the 8-bit reconstructions of the posterior's mode, so they
are what a viewer gets. SSIM is Wang et al. 2004 with a Gaussian window (sigma 1.5, 11 pixels, fewer
for smaller images), K1 = 0.01, K2 = 0.03.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from etils import epath
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from tqdm import tqdm

from lfm_jax.data import ImageSource
from lfm_jax.vae.codec import Codec, from_uint8, to_uint8
from lfm_jax.writers import save_image, write_json

Features = Callable[[Any], dict[str, Any]]


def image_psnr(x: UInt8[np.ndarray, "h w c"], y: UInt8[np.ndarray, "h w c"]) -> float:
    """Peak signal-to-noise ratio in dB; 100 for equal images."""
    error = np.mean(np.square(x.astype(np.float64) - y.astype(np.float64)))
    return 100.0 if error == 0 else float(10 * np.log10(255.0**2 / error))


def image_ssim(x: UInt8[np.ndarray, "h w c"], y: UInt8[np.ndarray, "h w c"]) -> float:
    """Structural similarity, averaged over channels and over windows that lie inside the image."""
    radius = min(5, (min(x.shape[:2]) - 1) // 2)
    x, y = x.astype(np.float64), y.astype(np.float64)

    def blur(image):
        for axis in (0, 1):
            image = scipy.ndimage.gaussian_filter1d(image, 1.5, axis, radius=radius)
        return image

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    inside = (slice(radius, x.shape[0] - radius), slice(radius, x.shape[1] - radius))
    return float(similarity[inside].mean())


@jax.jit
def _reconstruct(codec: Codec, images):
    """Reconstruction of the mode, its scaled latents, and the posterior's variance."""
    mean, logvar = jnp.split(codec.encode_moments(from_uint8(images)), 2, axis=-1)
    z = (mean - codec.shift) * codec.scale
    return to_uint8(codec.decode(z)), z, jnp.exp(logvar) * codec.scale**2


class _Gaussian:
    """Mean and covariance of rows that come in batches (Chan, Golub & LeVeque 1979), float64."""

    def __init__(self):
        self.count = 0
        self.mean: Any = 0.0  # arrays once there are rows
        self.scatter: Any = 0.0

    def add(self, rows: Float[np.ndarray, "n d"]) -> None:
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        away = mean - self.mean
        total = self.count + len(rows)
        self.scatter = self.scatter + (rows - mean).T @ (rows - mean)
        self.scatter += np.outer(away, away) * (self.count * len(rows) / total)
        self.mean = self.mean + away * (len(rows) / total)
        self.count = total

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        return self.mean, self.scatter / max(self.count - 1, 1)


def reconstruction_report(
    codec: Codec,
    images: UInt8[np.ndarray, "n h w c"] | ImageSource,
    *,
    indices: Integer[np.ndarray, " n"] | None = None,
    batch_size: int = 16,
    extractor: Features | None = None,
    distance: Callable[..., float] | None = None,
    folder: epath.PathLike = "",
    pictures: int = 8,
) -> dict[str, Any]:
    """Measure reconstructions of ``images``.

    Args:
        codec: the autoencoder.
        images: real images, bytes; each side a multiple of the codec's factor.
        indices: which of them; all by default.
        batch_size: images at a time.
        extractor: images uint8 to ``{"features": [B, d]}``; with it the report has ``rfd``.
        distance: Frechet distance ``(mean1, covariance1, mean2, covariance2) -> float``, e.g.
            `lfm_jax.evaluate.frechet_distance`; needed with an extractor.
        folder: if given, ``reconstruction.json`` and ``reconstruction.png`` are written there.
        pictures: images in the picture.

    Returns:
        A dict of plain numbers: ``num_images``, ``psnr``, ``ssim``, ``latent_mean`` and
        ``latent_std`` per channel (scaled latents; the deviation of posterior samples),
        ``posterior_std`` per channel (root mean variance of the posterior alone), ``scale``,
        ``shift``, ``encoder`` (fingerprint) and, with an extractor, ``rfd`` and ``rfd_features``.

    Raises:
        UserError: the images do not fit the autoencoder.
    """
    if (extractor is None) != (distance is None):
        raise ValueError("extractor and distance come together")
    indices = np.arange(len(images)) if indices is None else indices
    psnrs, ssims, shown, real, fake = [], [], [], _Gaussian(), _Gaussian()
    total = squares = variance = 0.0
    steps = range(0, len(indices), batch_size)
    for start in tqdm(steps, "reconstruct", unit="batch", disable=len(steps) < 4):
        chunk = indices[start : start + batch_size]
        x = images.batch(chunk)["image"] if isinstance(images, ImageSource) else images[chunk]
        # A last, smaller batch is filled up so that the program compiles once.
        filled = np.concatenate([x, np.repeat(x[-1:], min(batch_size, len(indices)) - len(x), 0)])
        y, z, spread = (np.asarray(v)[: len(x)] for v in _reconstruct(codec, filled))
        psnrs += [image_psnr(a, b) for a, b in zip(x, y, strict=True)]
        ssims += [image_ssim(a, b) for a, b in zip(x, y, strict=True)]
        z = z.astype(np.float64)
        total += z.sum((0, 1, 2))
        squares += np.square(z).sum((0, 1, 2))
        variance += spread.astype(np.float64).sum((0, 1, 2))
        if extractor is not None:
            real.add(np.asarray(extractor(x)["features"]))
            fake.add(np.asarray(extractor(y)["features"]))
        shown += [(a, b) for a, b in zip(x, y, strict=True)][: max(pictures - len(shown), 0)]
    count = len(indices) * z.shape[1] * z.shape[2]
    mean = total / count
    report = {
        "num_images": len(indices),
        "psnr": float(np.mean(psnrs)),
        "ssim": float(np.mean(ssims)),
        "latent_mean": mean.tolist(),
        "latent_std": np.sqrt(squares / count - mean**2 + variance / count).tolist(),
        "posterior_std": np.sqrt(variance / count).tolist(),
        "scale": codec.scale,
        "shift": codec.shift,
        "encoder": codec.fingerprint,
    }
    if extractor is not None and distance is not None:
        report["rfd"] = float(distance(*real.moments, *fake.moments))
        report["rfd_features"] = getattr(extractor, "name", "features")
    if str(folder):
        write_json(epath.Path(folder) / "reconstruction.json", report)
        picture = Image.fromarray(side_by_side(shown))
        save_image(epath.Path(folder) / "reconstruction.png", picture)
    return report


def side_by_side(
    pairs: list[tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h w c"]]],
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Originals, reconstructions and four times their difference, one column an image."""
    columns = []
    for x, y in pairs:
        difference = np.abs(x.astype(np.int32) - y.astype(np.int32)) * 4
        column = np.concatenate([x, y, np.clip(difference, 0, 255).astype(np.uint8)])
        # Small images are enlarged by repetition: a viewer's smoothing would hide artefacts.
        zoom = max(1, 64 // x.shape[0])
        column = column.repeat(zoom, 0).repeat(zoom, 1)
        columns.append(np.broadcast_to(column, (*column.shape[:2], 3)))
    return np.ascontiguousarray(np.concatenate(columns, axis=1))
