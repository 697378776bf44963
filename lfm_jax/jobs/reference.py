"""Write the statistics of real images, for comparisons that do not have the images at hand."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.data import open_cache
from lfm_jax.errors import UserError
from lfm_jax.evaluate import make_reference, write_reference
from lfm_jax.jobs import build
from lfm_jax.jobs.judge import BATCH, Images, Look, judge, of_source, spread
from lfm_jax.vae import Codec, to_uint8
from lfm_jax.workdir import Workdir


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.reference
    if section.of == "latents":
        fingerprint = open_cache(workdir.latents(section.split)).fingerprint
    else:
        fingerprint = build.images(config, section.split).fingerprint
    return {"images": fingerprint, **build.section(config, "reference", "evaluate")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section, quality = config.reference, config.evaluate.jpeg
    if section.of == "latents":
        codec = build.codec(config, workdir)
        cache = open_cache(workdir.latents(section.split), encoder=codec.fingerprint)
        images, count = decoded(codec, cache), len(cache)
        name, fingerprint = f"latent cache of {section.split}, decoded", cache.fingerprint
    else:
        source = build.images(config, section.split)
        images, count = of_source(source, np.arange(len(source))), len(source)
        name, fingerprint = f"{source.name} {section.split}", source.fingerprint
    if section.images > count:
        raise UserError(
            f"--config.reference.images={section.images}: expected at most {count}, the images of "
            f"{name}"
        )
    extractor, _ = judge(config, workdir)
    features = Look(extractor=extractor, jpeg=quality)(images, count, "reference")
    kept = None
    if section.images:
        places = spread(count, section.images)
        kept = np.concatenate([next(iter(images(i, i + 1))) for i in places.tolist()])
    reference = make_reference(
        features,
        source=name,
        source_fingerprint=fingerprint,
        crop=f"to {config.data.image_size} pixels",
        jpeg_quality=quality,
        images=kept,
    )
    path = workdir.root / "references" / f"{extractor.name}-{section.split}.npz"
    if sharding.is_main_process():
        write_reference(path, reference, format=section.format)
    return {
        "file": str(path.relative_to(workdir.root)),
        "format": section.format,
        "count": features.count,
        "pipeline": features.pipeline,
        "extractor": features.fingerprint,
    }


def decoded(codec: Codec, cache: Any) -> Images:
    """The images of a latent cache: the mean of each posterior, decoded."""

    @jax.jit
    def decode(codec: Codec, moments):
        mean = moments[..., : codec.latent_channels].astype(np.float32)
        return to_uint8(codec.decode((mean - codec.shift) * codec.scale))

    def read(start: int, stop: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, BATCH):
            places = np.minimum(np.arange(first, first + BATCH), stop - 1)
            found = np.asarray(decode(codec, cache.read(places)["moments"]))
            yield found[: min(BATCH, stop - first)]

    return read
