"""How well an autoencoder reconstructs: PSNR, SSIM, feature distance, latent statistics, a picture.

PSNR and SSIM are means over images of the 8-bit reconstructions of the posterior's mode, so they
are what a viewer gets. SSIM is Wang et al. 2004 with a Gaussian window (sigma 1.5, 11 pixels, fewer
for smaller images), K1 = 0.01, K2 = 0.03.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from lfm_jax.vae.codec import Codec, from_uint8, to_uint8

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


def reconstruction_report(
    codec: Codec,
    images: UInt8[np.ndarray, "n h w c"],
    *,
    batch_size: int = 16,
    extractor: Features | None = None,
    distance: Callable[..., float] | None = None,
    folder: str | Path = "",
    pictures: int = 8,
) -> dict[str, Any]:
    """Measure reconstructions of ``images``.

    Args:
        codec: the autoencoder.
        images: real images, bytes; each side a multiple of the codec's factor.
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
    psnrs, ssims, shown, real, fake = [], [], [], [], []
    total = squares = variance = 0.0
    steps = range(0, len(images), batch_size)
    for start in tqdm(steps, "reconstruct", disable=len(steps) < 4):
        x = images[start : start + batch_size]
        # A last, smaller batch is filled up so that the program compiles once.
        filled = np.concatenate([x, np.repeat(x[-1:], min(batch_size, len(images)) - len(x), 0)])
        y, z, spread = (np.asarray(v)[: len(x)] for v in _reconstruct(codec, filled))
        psnrs += [image_psnr(a, b) for a, b in zip(x, y, strict=True)]
        ssims += [image_ssim(a, b) for a, b in zip(x, y, strict=True)]
        z = z.astype(np.float64)
        total += z.sum((0, 1, 2))
        squares += np.square(z).sum((0, 1, 2))
        variance += spread.astype(np.float64).sum((0, 1, 2))
        if extractor is not None:
            real.append(np.asarray(extractor(x)["features"], np.float64))
            fake.append(np.asarray(extractor(y)["features"], np.float64))
        shown += [(a, b) for a, b in zip(x, y, strict=True)][: max(pictures - len(shown), 0)]
    count = len(images) * z.shape[1] * z.shape[2]
    mean = total / count
    report = {
        "num_images": len(images),
        "psnr": float(np.mean(psnrs)),
        "ssim": float(np.mean(ssims)),
        "latent_mean": mean.tolist(),
        "latent_std": np.sqrt(squares / count - mean**2 + variance / count).tolist(),
        "posterior_std": np.sqrt(variance / count).tolist(),
        "scale": codec.scale,
        "shift": codec.shift,
        "encoder": codec.fingerprint,
    }
    if extractor is not None:
        real, fake = np.concatenate(real), np.concatenate(fake)
        report["rfd"] = float(distance(*_gaussian(real), *_gaussian(fake)))
        report["rfd_features"] = getattr(extractor, "name", "features")
    if str(folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        picture = side_by_side(shown)
        _write(folder / "reconstruction.json", (json.dumps(report, indent=1) + "\n").encode())
        temporary = folder / f".reconstruction.{os.getpid()}.png"
        Image.fromarray(picture).save(temporary)
        temporary.replace(folder / "reconstruction.png")
    return report


def _gaussian(features: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


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
