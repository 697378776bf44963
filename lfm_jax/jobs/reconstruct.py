"""Judge the autoencoder alone: PSNR, SSIM, Frechet distance, latent statistics and a picture.

The picture has originals, reconstructions and four times their difference, one column an image:
``DIR/reconstruction/reconstruction.png``.
"""

from typing import Any

from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.evaluate import frechet_distance
from lfm_jax.jobs import build
from lfm_jax.jobs.judge import judge, spread
from lfm_jax.vae import reconstruction_report
from lfm_jax.workdir import Workdir


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    return {
        "images": build.images(config, config.reconstruct.split).fingerprint,
        "codec": build.codec(config, workdir).fingerprint,
        **build.section(config, "autoencoder", "reconstruct", "evaluate"),
    }


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.reconstruct
    source = build.images(config, section.split)
    judged = {}
    if section.rfd:
        judged = {"extractor": judge(config, workdir)[0], "distance": frechet_distance}
    return reconstruction_report(
        build.codec(config, workdir),
        source,
        indices=spread(len(source), min(section.num_images, len(source))),
        batch_size=config.encode.batch_size,
        folder=workdir.root / "reconstruction" if sharding.is_main_process() else "",
        pictures=section.pictures,
        **judged,
    )
