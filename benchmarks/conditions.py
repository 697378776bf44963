r"""Do samples obey their conditions? Masks, maps and layouts, with baselines, tables and grids.

python -m lfm_jax.main --config=configs/inpaint_fashion_mnist.py --workdir=runs/inpaint \
    --config.init=runs/fashion_mnist
python -m benchmarks.conditions inpaint runs/inpaint --base=runs/fashion_mnist
python -m benchmarks.conditions semantic runs/semantic
python -m benchmarks.conditions layout runs/layout

Everything is held out: test images, masks of other seeds, canvases of digits that no training
canvas holds. Every table stands in docs/results/conditions_<part>.json with its grid beside it.
"""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from benchmarks.figures import RESULTS, record
from lfm_jax import checkpoints, rng
from lfm_jax.conditions import ENCODER, figures, inpaint_by_replacement, latent_hole
from lfm_jax.conditions.inpainting import composite
from lfm_jax.config import default_config
from lfm_jax.data.maps import garment_parts
from lfm_jax.evaluate import frechet_of, inpainting_discrimination
from lfm_jax.features import predict
from lfm_jax.flow import NetworkVelocity
from lfm_jax.jobs import build, condition, condition_figures
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.judge import Look, judge, of_array
from lfm_jax.models import Cond
from lfm_jax.vae import to_uint8
from lfm_jax.workdir import Workdir
from lfm_jax.writers import save_image, write_json

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "inpaint": "inpaint_fashion_mnist",
    "semantic": "semantic_fashion_mnist",
    "layout": "layout_digits",
}
MASKS = ("lama", "center", "half", "outpaint", "freeform")
BATCH = 250


def sampled(
    config: ConfigDict, workdir: Workdir, params: Any, *, given: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray | None, Any]:
    """Samples under held-out conditions, their classes, and the conditions.

    `options` are fields of `config.sample`.
    """
    config = config.copy_and_resolve_references()
    config.sample.update(options)
    generator = Generator.from_config(config, workdir)
    if given is not None:
        generator = dataclasses.replace(generator, given=given)
    given, images = generator.given, []
    indices = np.arange(config.sample.num_samples)
    labels = None if given.labels is None else given.labels[given.numbers(indices)]
    for start in tqdm(range(0, len(indices), BATCH), desc="samples", unit="batch"):
        chunk = np.arange(start, start + BATCH)
        classes = None if labels is None else labels[chunk % len(labels)]
        images.append(generator(params, chunk, classes)[0])
    return np.concatenate(images)[: len(indices)], labels, given


def inpaint(config: ConfigDict, run: Path, base: Path | None, count: int, command: str) -> None:
    """Each kind of mask: the trained condition, the class mean, replacement."""
    workdir, look, params = _opened(config, run)
    means = figures.class_means(build.images(config, "train"), config.data.num_classes)
    rows = []
    for kind in MASKS:
        made, labels, given = sampled(config, workdir, params, masks=kind, num_samples=count)
        told = given.plain(np.arange(count))
        truth, hole = told["image"], told["mask"]
        answers = {
            "trained": composite(made, truth, hole),
            "class mean": composite(means[labels], truth, hole),
        }
        if base is not None:
            answers["replacement"] = _replaced(config, base, given, labels, count)
        real = look(of_array(truth), count, "truth")
        for name, completed in answers.items():
            rows.append({"masks": kind, "by": name} | _scores(look, real, completed, truth, hole))
            print(json.dumps(rows[-1]))
    by = {(row["masks"], row["by"]): row for row in rows}

    def add(name: str, value: Any, op: str, bound: Any, note: str = "") -> None:
        record("conditions", f"inpainting: {name}", value, op, bound, command, note)

    setting = f"{count} held-out test images, {_solver(config, workdir)}, no guidance"
    for kind in MASKS:
        trained, mean = by[kind, "trained"], by[kind, "class mean"]
        gain = trained["psnr_hole"] - mean["psnr_hole"]
        ratio = trained["fd"] / mean["fd"]
        told = (
            f"{kind} masks ({100 * trained['hole_share']:.0f} % hole), {setting}; in the hole PSNR "
            f"{trained['psnr_hole']:.2f} against {mean['psnr_hole']:.2f} dB, "
            f"FD {trained['fd']:.3f} against {mean['fd']:.3f}"
        )
        asked = kind == "lama"
        suffix = "" if asked else f" ({kind} masks)"
        bounds = ((">=", 3.0), ("<", 0.5)) if asked else (("report", None), ("report", None))
        add(f"PSNR inside the hole over filling with the class mean, dB{suffix}", gain,
            *bounds[0], told)  # fmt: skip
        add(f"FD of completed images over that of mean filling{suffix}", ratio, *bounds[1], told)
        for key in ("p_ids", "u_ids"):
            add(f"{key.replace('_', '-').upper()} ({kind} masks)", trained[key], "report", None,
                f"of features of {look.extractor.name}; class mean {mean[key]:.3f}")  # fmt: skip
        if base is not None:
            other = by[kind, "replacement"]
            add(f"FD over that of training-free replacement ({kind} masks)",
                trained["fd"] / other["fd"], "report", None,
                f"replacement: FD {other['fd']:.3f}, PSNR in the hole {other['psnr_hole']:.2f} dB"
                )  # fmt: skip
    exact = all(row["known_exact"] for row in rows if row["by"] == "trained")
    add("known pixels exact", exact, "==", True, "bit for bit, all kinds of masks")

    few, repeats = 100, 4
    made, _, given = sampled(config, workdir, params, masks="half+freeform", repeats=repeats,
                             num_samples=few * repeats)  # fmt: skip
    told = given.plain(given.numbers(np.arange(few * repeats)))
    completed = composite(made, told["image"], told["mask"])
    groups = completed.reshape(few, repeats, *completed.shape[1:])
    inside = told["mask"].mean()
    add("mean distance between two completions of large holes, RMS of 255 in the hole",
        figures.pairwise_distance(groups) / np.sqrt(inside), "report", None,
        f"{repeats} completions of each of {few} images, half and freeform masks")  # fmt: skip
    save_image(RESULTS / "conditions_inpainting.png", condition.given_grid(given, completed))

    ways = {
        f"guided, mask {mask}, class {label}": {"condition_guidance": mask, "guidance": label}
        for mask, label in ((1.5, 1.0), (1.0, 1.5), (1.5, 1.5))
    }
    ways |= {f"euler, {n} steps": {"solver": "euler", "num_steps": n} for n in (1, 2, 4, 8)}
    ways["heun, 16 steps"] = {"solver": "heun", "num_steps": 16}
    for kind in ("lama", "freeform"):
        for name, options in ways.items():
            made, _, given = sampled(
                config, workdir, params, masks=kind, num_samples=count // 2, **options
            )
            told = given.plain(np.arange(count // 2))
            completed = composite(made, told["image"], told["mask"])
            real = look(of_array(told["image"]), count // 2, "truth")
            row = _scores(look, real, completed, told["image"], told["mask"])
            rows.append({"masks": kind, "by": name, "samples": count // 2} | row)
            print(json.dumps(rows[-1]))
    write_json(RESULTS / "conditions_inpainting.json", {"command": command, "rows": rows})


def _scores(look: Look, real: Any, completed: np.ndarray, truth: np.ndarray, hole: np.ndarray):
    features = look(of_array(completed), len(completed), "completed")
    pids, uids = inpainting_discrimination(real.features, features.features)
    return {
        "hole_share": float(hole.mean()),
        "psnr_hole": figures.psnr(completed, truth, hole),
        "known_exact": bool((completed == truth)[~hole].all()),
        "fd": frechet_of(features.statistics, real.statistics),
        "p_ids": pids,
        "u_ids": uids,
    }


def _replaced(
    config: ConfigDict, base: Path, given: Any, labels: np.ndarray, count: int
) -> np.ndarray:
    """The unconditional flow's class-conditional velocity, known latents put back at every step."""
    codec = given.codec
    model = build.network(config)
    params = checkpoints.load_params(base / "checkpoints")
    keys = rng.stream_keys(jax.random.key(7), rng.Stream.SAMPLE, jnp.arange(count + BATCH))

    @jax.jit
    def fill(params, codec, keys, masked, hole, label):
        noise = rng.normal(keys, masked.shape[1:])
        velocity = NetworkVelocity(params=params, cond=Cond(label=label), model=model)
        known = (masked - codec.shift) * codec.scale
        latents, _ = inpaint_by_replacement(
            velocity, noise, known, latent_hole(hole, codec.factor), keys, num_steps=16, resample=5
        )
        return to_uint8(codec.decode(latents))

    made = []
    for start in tqdm(range(0, count, BATCH), desc="replacement", unit="batch"):
        chunk = np.arange(start, start + BATCH)
        inputs = given.inputs(chunk)
        hole = given.plain(given.numbers(chunk))["mask"]
        masked = inputs["masked"].astype(np.float32)
        made.append(fill(params, codec, keys[chunk], masked, hole, labels[chunk % len(labels)]))
    told = given.plain(np.arange(count))
    return composite(np.concatenate(made)[:count], told["image"], told["mask"])


def semantic(config: ConfigDict, run: Path, base: Path | None, count: int, command: str) -> None:
    """The map that was given, the one read from the sample, and maps of other images."""
    del base
    workdir, look, params = _opened(config, run)
    made, labels, given = sampled(config, workdir, params, num_samples=count)
    told = given.plain(np.arange(count))
    maps, truth, classes = told["map"], told["image"], given.condition.num_classes
    rebuilt = condition_figures.rebuilt(given.codec, truth)

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        return figures.mean_iou(a, b, classes)[0]

    # Each map goes to the next image of its class: no image keeps its own.
    other = np.arange(count)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        other[members] = np.roll(members, len(members) // 2)
    exchanged = dataclasses.replace(given, arrays=lambda numbers, _: {"map": maps[other[numbers]]})
    swapped, _, _ = sampled(config, workdir, params, num_samples=count, given=exchanged)

    values = {
        "samples": iou(maps, garment_parts(made)),
        "reconstructions": iou(maps, garment_parts(rebuilt)),
        "exchanged, with the map given": iou(maps[other], garment_parts(swapped)),
        "exchanged, with the original map": iou(maps, garment_parts(swapped)),
        "unrelated real maps": iou(maps, maps[other]),
    }
    setting = (
        f"{count} held-out test images, {_solver(config, workdir)}, no guidance; mIoU of "
        "background, garment and edge over all pixels"
    )
    print(json.dumps(values))

    def add(name: str, value: Any, op: str, bound: Any, note: str = setting) -> None:
        record("conditions", f"semantic: {name}", value, op, bound, command, note)

    ratio = values["samples"] / values["reconstructions"]
    told_note = (
        f"{values['samples']:.3f} over {values['reconstructions']:.3f} (maps read from "
        f"reconstructions); {setting}"
    )
    add("mIoU of given and re-extracted map over that of reconstructions", ratio, ">=", 0.9,
        told_note)  # fmt: skip
    add("mIoU that maps of reconstructions reach", values["reconstructions"], "report", None)
    fall = values["exchanged, with the original map"] - values["unrelated real maps"]
    add("maps exchanged within the class: agreement with the original map less that of unrelated "
        "real maps", abs(fall), "<=", 0.05,
        f"{values['exchanged, with the original map']:.3f} against "
        f"{values['unrelated real maps']:.3f}")  # fmt: skip
    stays = values["exchanged, with the map given"] / values["samples"]
    add("maps exchanged within the class: agreement with the given map over that of its own",
        stays, ">=", 0.95)  # fmt: skip
    real = look(of_array(truth), count, "truth")
    for name, pictures in (("samples", made), ("reconstructions", rebuilt)):
        features = look(of_array(pictures), count, name)
        add(f"FD of {name} ({look.extractor.name})",
            frechet_of(features.statistics, real.statistics), "report", None)  # fmt: skip
    add("encoder's relative change in training", _moved(config, given, params), ">", 0.0,
        "norm of the change of its parameters over that of their start")  # fmt: skip
    write_json(RESULTS / "conditions_semantic.json", {"command": command, "miou": values})
    few, repeats = 10, 4
    shown, _, given = sampled(config, workdir, params, num_samples=few * repeats, repeats=repeats)
    save_image(RESULTS / "conditions_semantic.png", condition.given_grid(given, shown))


def _moved(config: ConfigDict, given: Any, params: Any) -> float:
    """How far the encoder went from the parameters that training began with."""
    from lfm_jax.conditions import init_conditioned

    shape = build.latent_shape(config, given.codec)
    key = jax.random.key(config.seed)
    start = init_conditioned(given.condition, build.network(config), key, shape)[ENCODER]
    ends = jax.tree.leaves(params[ENCODER])
    pairs = list(zip(jax.tree.leaves(start), ends, strict=True))
    change = sum(float(np.square(b - a).sum()) for a, b in pairs)
    return float(np.sqrt(change / sum(float(np.square(a).sum()) for a, _ in pairs)))


def layout(config: ConfigDict, run: Path, base: Path | None, count: int, command: str) -> None:
    """What a classifier reads in the boxes, what lies outside, and where the digits are."""
    del base
    workdir, _, params = _opened(config, run)
    config.evaluate.classifier_epochs = 12
    reader, accuracy = condition_figures.crop_reader(config)
    rows, shown = [], None
    for scale in (1.0, config.sample.condition_guidance, 2.5):
        made, _, given = sampled(
            config, workdir, params, num_samples=count, condition_guidance=scale
        )
        told = given.plain(np.arange(count))
        rows.append({"by": f"guidance {scale:g}"} | _boxes(reader, made, told))
        print(json.dumps(rows[-1]))
    truth = told["image"]
    pictures = {"real": truth, "reconstructions": condition_figures.rebuilt(given.codec, truth)}
    rows += [{"by": name} | _boxes(reader, images, told) for name, images in pictures.items()]
    chosen, real, rebuilt = rows[1], rows[-2], rows[-1]
    setting = (
        f"{rows[1]['boxes']} boxes on {count} held-out layouts, {_solver(config, workdir)}, "
        f"guidance {config.sample.condition_guidance:g}; a classifier of crops that reads "
        f"{100 * accuracy:.1f} % of held-out real digits"
    )

    def add(name: str, value: Any, op: str, bound: Any, note: str = setting) -> None:
        record("conditions", f"layout: {name}", value, op, bound, command, note)

    add("boxes whose crop reads as the digit asked for", chosen["crop_accuracy"], ">=", 0.85,
        f"{setting}; unguided {rows[0]['crop_accuracy']:.3f}, guidance 2.5 "
        f"{rows[2]['crop_accuracy']:.3f}, reconstructions {rebuilt['crop_accuracy']:.3f}, real "
        f"canvases {real['crop_accuracy']:.3f}")  # fmt: skip
    add("share of empty pixels that are lit", chosen["empty_lit"], "report", None,
        f"brighter than 48 of 255, outside of all boxes; reconstructions {rebuilt['empty_lit']:.4f}"
        )  # fmt: skip
    add("IoU of box and drawn extent", chosen["box_iou"], "report", None,
        f"read from the pixels; real canvases {real['box_iou']:.3f}")  # fmt: skip
    write_json(RESULTS / "conditions_layout.json", {"command": command, "rows": rows})
    few, repeats = 10, 4
    shown, _, given = sampled(config, workdir, params, num_samples=few * repeats, repeats=repeats)
    save_image(RESULTS / "conditions_layout.png", condition.given_grid(given, shown))


def _boxes(reader: Any, images: np.ndarray, told: dict[str, np.ndarray]) -> dict[str, Any]:
    boxes, classes = told["boxes"], told["classes"]
    cut = figures.crops(images, boxes, classes, size=8)
    empty = figures.outside_boxes(boxes, classes, images.shape[1])
    return {
        "boxes": len(cut["label"]),
        "crop_accuracy": float((predict(reader, cut["image"]) == cut["label"]).mean()),
        "empty_lit": float((images.max(-1)[empty] > 48).mean()),
        "box_iou": figures.box_iou(images, boxes, classes, threshold=48),
    }


def _opened(config: ConfigDict, run: Path) -> tuple[Workdir, Look, Any]:
    workdir = Workdir(epath.Path(run))
    extractor, _ = judge(config, workdir)
    params = checkpoints.load_params(workdir.checkpoints, ema=True)
    return workdir, Look(extractor=extractor), params


def _solver(config: ConfigDict, workdir: Workdir) -> str:
    """What a reader must know of the network and of how it was sampled."""
    trained = checkpoints.latest_step(workdir.checkpoints)
    return (
        f"{trained} training steps, sampled by {config.sample.solver} in {config.sample.num_steps}"
    )


def _config(name: str, run: Path) -> ConfigDict:
    """The experiment's config, with what the run itself had set."""
    file = ROOT / "configs" / f"{CONFIGS[name]}.py"
    spec = importlib.util.spec_from_file_location(CONFIGS[name], file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    told = json.loads((run / "config.json").read_text())["config"]
    config.init = told["init"]  # whose judge it shares
    known = default_config()
    for section in ("autoencoder", "model", "condition", "data"):
        for key, value in told[section].items():
            if key in known[section] and key != "path" and value is not None:
                config[section][key] = tuple(value) if isinstance(value, list) else value
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=CONFIGS)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", type=Path, help="inpaint: the run for training-free replacement")
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    told = " --base=runs/fashion_mnist" if arguments.base else ""
    command = f"python -m benchmarks.conditions {arguments.part} runs/{arguments.part}{told}"
    config = _config(arguments.part, arguments.run)
    parts = {"inpaint": inpaint, "semantic": semantic, "layout": layout}
    parts[arguments.part](config, arguments.run, arguments.base, arguments.count, command)


if __name__ == "__main__":
    main()
