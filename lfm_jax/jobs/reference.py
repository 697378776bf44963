"""Write the statistics of real images, for comparisons that do not have the images at hand."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lfm_jax.evaluate import collect_features, jpeg_round_trip, make_reference, write_reference
from lfm_jax.jobs import build
from lfm_jax.jobs.evaluate import judge
from lfm_jax.workdir import Workdir

_BATCH = 250


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    source = build.images(config, config.reference.split)
    return {"images": source.fingerprint, **build.section(config, "reference", "evaluate")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section, quality = config.reference, config.evaluate.jpeg
    source = build.images(config, section.split)
    extractor, _ = judge(config, workdir)

    def batches():
        for start in range(0, len(source), _BATCH):
            stop = min(start + _BATCH, len(source))
            images = source.batch(np.arange(start, stop))["image"]
            yield jpeg_round_trip(images, quality=quality) if quality else images

    features = collect_features(
        extractor, batches(), batch_size=_BATCH, total=len(source), description="reference"
    )
    reference = make_reference(
        features,
        source=f"{source.name} {section.split}",
        source_fingerprint=source.fingerprint,
        crop=f"to {config.data.image_size} pixels",
        jpeg_quality=quality,
    )
    path = workdir.root / "references" / f"{extractor.name}-{section.split}.npz"
    write_reference(path, reference, format=section.format)
    return {
        "file": str(path.relative_to(workdir.root)),
        "format": section.format,
        "count": features.count,
        "pipeline": features.pipeline,
        "extractor": features.fingerprint,
    }
