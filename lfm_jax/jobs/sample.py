"""Solve the flow for N samples, decode, and write ``samples.npz`` with a labelled grid.

The samples are written in parts as they come; a killed job goes on with the parts that are missing.
"""

import io
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from lfm_jax import checkpoints, sharding
from lfm_jax.conditions.inpainting import composite
from lfm_jax.config import content_hash
from lfm_jax.evaluate import write_samples
from lfm_jax.flow import describe_failure
from lfm_jax.jobs import build, guide, pictures, watch
from lfm_jax.jobs.condition import Given, given_grid
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.sample_options import fixed_steps, sample_labels
from lfm_jax.workdir import Workdir
from lfm_jax.writers import save_image, write_bytes


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    sampling = build.section(config, "sample")
    del sampling["sample"]["batch_size"]
    beside = guide.inputs(config, workdir)
    return {"checkpoint": workdir.checkpoint(), **sampling, **beside}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.sample
    guide.check_null_label(config, workdir)
    generator = Generator.from_config(config, workdir)
    labels = sample_labels(config, generator.given)
    folder = workdir.checkpoints if section.checkpoint == "newest" else watch.folder(workdir)
    step = checkpoints.latest_step(folder)
    params = checkpoints.load_params(folder, ema=section.ema)
    params = jax.device_put(params, sharding.state_sharding(params, generator.mesh))

    # ---- the samples, part by part
    parts = _parts(config, workdir)
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
                    images = _with_known_pixels(generator.given, indices, images)
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
        "num_steps": None if section.rtol else fixed_steps(config),
        "grid": None if section.rtol else section.grid,
        "rtol": section.rtol or None,
        "guidance": section.guidance,
        **_of_guidance(section),
        **_of_condition(config),
        "seed": section.seed,
        # The first part holds the compilation.
        "images_per_second": float(1 / np.median(seconds[1:])) if len(seconds) > 1 else None,
    }
    if section.latency:
        figures["latency_seconds"] = _latency(generator, params, labels, section.latency)
    for name in ("trajectory", "interpolation", "class_switch"):
        if section[name]:  # the pictures are made by all processes together
            picture = getattr(pictures, name)(config, generator, params)
            if sharding.is_main_process():
                save_image(workdir.samples / f"{name}.png", picture)
    if sharding.is_main_process():
        figures |= _join(config, workdir, paths, labels, generator.given)
    return figures


def clean(config: ConfigDict, workdir: Workdir) -> None:
    """Remove the parts, of which the result is made."""
    if sharding.is_main_process() and (parts := _parts(config, workdir)).exists():
        parts.rmtree()


def _parts(config: ConfigDict, workdir: Workdir) -> epath.Path:
    """Where the parts of exactly these samples lie; they are as long as a batch."""
    made_of = content_hash(inputs(config, workdir))[:16]
    return workdir.samples / f"parts-{made_of}-{config.sample.batch_size}"


def _of_guidance(section: ConfigDict) -> dict[str, Any]:
    """The further options that say how samples were made, where they are in use."""
    unused = {
        "guidance_interval": (0.0, 1.0),
        "guidance_rescale": 0.0,
        "guidance_channels": 0,
        "autoguidance": 1.0,
        "classifier_guidance": 0.0,
        "sde": "",
        "eta": 0.0,
    }
    return {key: section[key] for key, value in unused.items() if section[key] != value}


def _of_condition(config: ConfigDict) -> dict[str, Any]:
    if config.condition.kind == "none":
        return {}
    section = config.sample
    return {
        "condition": config.condition.kind,
        "condition_guidance": section.condition_guidance,
        "repeats": section.repeats,
    }


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


def _agreed(missing: np.ndarray) -> np.ndarray:
    """What the main process found missing, in every process: all must run the same programs."""
    if jax.process_count() == 1:
        return missing
    return multihost_utils.broadcast_one_to_all(missing)


def _with_known_pixels(given: Given | None, indices: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Inpainted images with the pixels that were known; other samples as they are."""
    if given is None or given.condition.name != "inpainting":
        return images
    told = given.plain(given.numbers(indices))
    return composite(images, told["image"], told["mask"])


def _join(
    config: ConfigDict,
    workdir: Workdir,
    paths: list[epath.Path],
    labels: np.ndarray | None,
    given: Given | None,
) -> dict[str, float]:
    """One file and one picture of all parts; the mean counts of the solver."""
    section, count, first = config.sample, config.sample.num_samples, _load(paths[0])

    def parts(name: str) -> Iterator[np.ndarray]:
        for path in paths:
            yield _load(path)[name]

    def pick(indices: np.ndarray) -> np.ndarray:
        """Some images, opening the parts that hold them one at a time."""
        found = np.empty((len(indices), *first["images"].shape[1:]), np.uint8)
        part = indices // section.batch_size
        for number in np.unique(part):
            images = _load(paths[number])["images"]
            found[part == number] = images[indices[part == number] % section.batch_size]
        return found

    # What another run with other options left would stand beside these as if it were theirs.
    for stale in ("latents.npz", "trajectory.png", "interpolation.png", "class_switch.png"):
        if not section[stale.partition(".")[0]]:
            (workdir.samples / stale).unlink(missing_ok=True)
    for stale in ("png", "jpeg"):
        if (workdir.samples / stale).exists():
            (workdir.samples / stale).rmtree()
    for name, key in (("samples", "images"), ("latents", "latents")):
        if key in first:
            shape = (count, *first[key].shape[1:])
            told = labels if key == "images" else None
            write_samples(
                workdir.samples / f"{name}.npz", parts(key), shape, told, dtype=first[key].dtype
            )
    if given is None:
        shown = pictures.first_of_classes(config, labels, count)
        told = None if labels is None else labels[shown]
        picture = pictures.grid(config, pick(shown), told)
    else:
        picture = given_grid(given, pick(np.arange(min(count, given.count * given.repeats))))
    save_image(workdir.samples / "grid.png", picture)
    for folder, quality in (("png", 0), ("jpeg", section.jpeg)):
        if section[folder]:
            images = (image for part in parts("images") for image in part)
            _write_images(workdir.samples / folder, images, jpeg=quality)
    # Each part counts by its size: the last one may be shorter.
    sizes = [min(section.batch_size, count - i * section.batch_size) for i in range(len(paths))]
    means = {name: [_load(path)[name] for path in paths] for name in ("nfe", "network_calls")}
    return {name: float(np.average(values, weights=sizes)) for name, values in means.items()}


def _counts(stats: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: np.mean(np.asarray(stats[name])) for name in ("nfe", "network_calls")}


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _load(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a part; no pickled object is ever loaded."""
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _write_images(folder: epath.Path, images: Iterator[np.ndarray], *, jpeg: int) -> None:
    """One file an image: PNG, or JPEG of a quality."""
    for i, image in enumerate(tqdm(images, desc=folder.name, unit="img")):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        if jpeg:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=jpeg)
            write_bytes(folder / f"{i:06d}.jpg", buffer.getvalue())
        else:
            save_image(folder / f"{i:06d}.png", picture)
