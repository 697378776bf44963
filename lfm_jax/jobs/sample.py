"""Solve the flow for N samples, decode, and write ``samples.npz`` with a labelled grid.

The samples are written in parts as they come; a killed job goes on with the parts that are missing.
"""

import io
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax import checkpoints, sharding
from lfm_jax.config import content_hash
from lfm_jax.flow import describe_failure
from lfm_jax.jobs import build
from lfm_jax.jobs.generate import Generator, class_names, load_samples, sample_labels
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image, write_bytes

_PER_CLASS = 10  # columns of the grid


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    sampling = build.section(config, "sample")
    del sampling["sample"]["batch_size"]
    return {"checkpoint": workdir.checkpoint(), **sampling}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.sample
    labels = sample_labels(config)
    generator = Generator.from_config(config, workdir)
    step = checkpoints.latest_step(workdir.checkpoints)
    params = checkpoints.load_params(workdir.checkpoints, ema=section.ema)
    params = jax.device_put(params, sharding.state_sharding(params, generator.mesh))

    # ---- the samples, part by part
    parts = workdir.samples / f"parts-{content_hash(inputs(config, workdir))[:16]}"
    starts = range(0, section.num_samples, section.batch_size)
    paths = [parts / f"{start:08d}.npz" for start in starts]
    missing = _agreed(np.array([not path.exists() for path in paths]))
    seconds = []
    with tqdm(
        total=section.num_samples, desc="sample", unit="img", disable=not sharding.is_main_process()
    ) as bar:
        for start, path, wanted in zip(starts, paths, missing, strict=True):
            stop = min(start + section.batch_size, section.num_samples)
            if wanted:
                begin = time.perf_counter()
                # Always a whole batch, so that one program serves all; what is over is cut off.
                indices = np.arange(start, start + section.batch_size)
                chosen = None if labels is None else labels[indices % len(labels)]
                images, latents, stats = generator(params, indices, chosen)
                seconds.append((time.perf_counter() - begin) / section.batch_size)
                failure = describe_failure(stats, indices)
                if failure:
                    raise FloatingPointError(f"sample: {failure}; finished parts are in {parts}")
                if sharding.is_main_process():
                    kept = {"images": images[: stop - start]}
                    if section.latents:
                        kept["latents"] = latents[: stop - start]
                    write_bytes(path, _npz(**kept, **_counts(stats)))
            bar.update(stop - start)

    figures = {
        "num_samples": section.num_samples,
        "checkpoint_step": step,
        "ema": section.ema,
        "solver": section.solver,
        "num_steps": None if section.rtol else section.num_steps,
        "rtol": section.rtol,
        "guidance": section.guidance,
        "seed": section.seed,
        # The first part holds the compilation.
        "images_per_second": float(1 / np.median(seconds[1:])) if len(seconds) > 1 else None,
    }
    if section.latency:
        figures["latency_seconds"] = _latency(generator, params, labels, section.latency)
    if section.trajectory:
        _trajectory(config, workdir, generator, params)
    if sharding.is_main_process():
        figures |= _join(config, workdir, paths, labels)
        parts.rmtree()
    return figures


def _latency(
    generator: Generator, params: Any, labels: np.ndarray | None, repeats: int
) -> dict[str, float]:
    """Median seconds for one sample, with and without decoding; compilation is not counted."""
    medians = {}
    for name, decode in (("with_decode", True), ("without_decode", False)):
        times = []
        for i in range(repeats + 1):
            begin = time.perf_counter()
            generator(params, [i], None if labels is None else labels[:1], decode=decode)
            times.append(time.perf_counter() - begin)
        medians[name] = float(np.median(times[1:]))
    return medians


def _trajectory(config: ConfigDict, workdir: Workdir, generator: Generator, params: Any) -> None:
    """A few samples on their way: a row of x_t, and under it where x_t is heading."""
    shown = max(min(config.data.num_classes, 5), 3)
    labels = np.arange(shown, dtype=np.int32)
    count = config.sample.trajectory
    states, estimates = generator.strip(params, range(shown), labels, count=count)
    rows = np.stack([states, estimates], axis=1)
    picture = image_grid(
        rows.reshape(-1, *rows.shape[3:]),
        columns=rows.shape[2],
        row_labels=["x_t", "estimate of x_0"] * shown,
    )
    if sharding.is_main_process():
        save_image(workdir.samples / "trajectory.png", picture)


def _agreed(missing: np.ndarray) -> np.ndarray:
    """What the main process found missing, in every process: all must run the same programs."""
    if jax.process_count() == 1:
        return missing
    return multihost_utils.broadcast_one_to_all(missing)


def _join(
    config: ConfigDict, workdir: Workdir, paths: list[epath.Path], labels: np.ndarray | None
) -> dict[str, float]:
    """One file and one picture of all parts; the mean counts of the solver."""
    chunks = [load_samples(path) for path in paths]
    images = np.concatenate([chunk["images"] for chunk in chunks])
    arrays = {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels}
    write_bytes(workdir.samples / "samples.npz", _npz(**arrays))
    if config.sample.latents:
        latents = np.concatenate([chunk["latents"] for chunk in chunks])
        write_bytes(workdir.samples / "latents.npz", _npz(arr_0=latents))
    save_image(workdir.samples / "grid.png", _grid(config, images, labels))
    if config.sample.png:
        _write_pngs(workdir, images)
    return {
        name: float(np.mean([chunk[name] for chunk in chunks])) for name in ("nfe", "network_calls")
    }


def _counts(stats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.mean(np.asarray(stats[name])) for name in ("nfe", "network_calls")}


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _grid(config: ConfigDict, images: np.ndarray, labels: np.ndarray | None):
    """The first samples of each class, a row a class; without classes the first hundred."""
    if labels is None:
        return image_grid(images[: _PER_CLASS**2], columns=_PER_CLASS)
    rows, cells = [], []
    for label, name in enumerate(class_names(config)):
        found = images[labels == label][:_PER_CLASS]
        if len(found):
            blank = np.full((_PER_CLASS - len(found), *images.shape[1:]), 255, np.uint8)
            cells.append(np.concatenate([found, blank]))
            rows.append(name)
    return image_grid(np.concatenate(cells), columns=_PER_CLASS, row_labels=rows)


def _write_pngs(workdir: Workdir, images: np.ndarray) -> None:
    from PIL import Image

    for i, image in enumerate(tqdm(images, desc="png", unit="img")):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        save_image(workdir.samples / "png" / f"{i:06d}.png", picture)
