"""Move images across the boundary of an attribute: fit, cross once, go on sampling. No training.

Everything that is chosen (the boundary, the mixing time, the strength) is chosen on training images
alone. Writes ``DIR/edit/``: ``boundary_<n>_<space>.npz`` of each
attribute, ``mixing.json`` and ``mixing.png``, ``edited.npz``, ``strips.png``, ``grid.png``.
"""

import io
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.boundary import load_boundary, save_boundary
from lfm_jax.boundary.crossing import fit_space, place
from lfm_jax.boundary.editor import Editor
from lfm_jax.boundary.hyperplane import MIN_SIDE, Boundary, check_sides
from lfm_jax.boundary.judges import (
    Judge,
    split_sides,
)
from lfm_jax.boundary.measure import flip_rate, leakage, monotonicity, pixel_distance, psnr
from lfm_jax.boundary.pictures import mixing_picture
from lfm_jax.boundary.search import (
    Examples,
    away,
    edit_curve,
    search_time,
    smallest_strength,
)
from lfm_jax.data import ImageSource
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, origin
from lfm_jax.jobs.editing import (
    base,
    crossing,
    magnitudes,
    make_editor,
    make_judges,
    of_source,
    targets,
)
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image, write_bytes, write_json

_MOST_SAMPLED = 300  # generated samples for the comparison of sources
FLIP_LEVEL = 0.85  # of the validation images: what the chosen strength must flip


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    sections = build.section(config, "data", "model", "autoencoder", "edit")
    sections["data"].pop("path", None)
    del sections["edit"]["batch_size"]
    params = origin.initial_params(str(base(config, workdir).root))
    return {"checkpoint": checkpoints.fingerprint(params), **sections}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.edit
    judges = make_judges(config, workdir)
    editor = make_editor(config, workdir)
    way = crossing(config)
    parts = way.space.parts(editor)
    folder = workdir.root / "edit"

    # ---- images: to edit (read first, so that a mistake shows first), to fit with, to choose with
    target = targets(config, editor, judges[0])
    train = build.images(config, "train")
    sets = split_sides(
        judges[0], train, count=section.num_fit, held_out=section.num_validation, seed=section.seed
    )
    for (_, sides), least in zip(sets, (MIN_SIDE, 1), strict=True):
        check_sides(sides, attribute=judges[0].attribute.name, least=least)
    fitted, validation = (of_source(editor, train, *chosen) for chosen in sets)

    # ---- where to cross
    provenance = {
        "model": checkpoints.fingerprint(jax.device_get(editor.params)),
        "codec": editor.codec.fingerprint,
        "source": section.source,
        "solver": f"{section.solver} {section.num_steps}",
    }
    loaded, mixing = None, None
    if section.boundary is not None:
        expected = {**{k: provenance[k] for k in ("model", "codec")}, **place(way.space, parts[0])}
        if section.time is not None:
            expected["t"] = float(section.time)
        if len(parts) > 1 or section.also:
            raise UserError(
                f"--config.edit.boundary={section.boundary}: one boundary of one space; expected "
                "edit.space z or h, and no edit.also"
            )
        loaded = load_boundary(section.boundary, expected=expected)
        t = float(loaded.provenance["t"])
    elif section.time is not None:
        t = float(section.time)
    else:
        mixing = search_time(
            editor,
            way,
            judges[0],
            fitted,
            validation,
            times=section.times,
            strengths=magnitudes(config),
            curves=section.curves,
            rule=section.rule,
            layers=[part for part in parts if part != "z"],
            completions=section.completions,
            method=section.method,
            cost=section.cost,
            seed=section.seed,
        )
        t = mixing["t"]
        write_json(folder / "mixing.json", mixing)
        mixing_picture(folder / "mixing.png", mixing)

    # ---- the boundaries
    begin = time.perf_counter()
    boundaries, quality = [], {}
    for number, judge in enumerate(judges[: 1 + len(section.also)]):
        if loaded is not None:
            boundaries.append({parts[0]: loaded})
            break
        states, own = _fit_states(editor, config, judge, train, fitted if number == 0 else None, t)
        options = {"method": section.method, "cost": section.cost, "seed": section.seed}
        boundary = fit_space(
            way.space,
            editor,
            states,
            own,
            t,
            provenance=provenance,
            attribute=judge.attribute.name,
            **options,
        )
        boundaries.append(boundary)
        for part, one in boundary.items():
            save_boundary(folder / f"boundary_{number}_{part}.npz", one)
    fit_seconds = time.perf_counter() - begin
    there = editor.invert(validation.latents, t)
    read = way.space.read(editor, there, t)
    for part, one in boundaries[0].items():
        quality[part] = {
            "method": one.method,
            "cost": one.cost,
            "auc_cross_validated": one.score,
            "held_out": one.measure(read[part], validation.sides),
            "spread": one.spread,
        }
    if "z" in parts and loaded is None:
        quality["cross"] = _cross(editor, config, judges[0], fitted, validation, t)

    # ---- how far, on the validation images
    curve = edit_curve(editor, way, boundaries, judges[0], validation, there, t, magnitudes(config))
    chosen = smallest_strength(curve, FLIP_LEVEL)

    # ---- the edits
    begin = time.perf_counter()
    states = editor.invert(target.latents, t)
    strengths = [float(s) for s in section.strengths]
    columns = [
        editor.decode(
            way.apply(editor, boundaries, states, t, strength, positions=target.positions)
        )
        for strength in strengths
    ]
    seconds = (time.perf_counter() - begin) / (len(target) * len(strengths))
    crossed = editor.decode(
        way.apply(
            editor,
            boundaries,
            states,
            t,
            away(target.sides, chosen, way.mode),
            positions=target.positions,
        )
    )
    plain = editor.decode(target.latents)
    down = editor.generate(states, t)
    unedited = editor.decode(down)

    # ---- what is left behind
    edited = np.stack(columns)
    _write(folder / "edited.npz", target, edited, crossed, strengths, chosen)
    rows = min(section.strips, len(target))
    titles = _titles(judges[0], target.sides[:rows])
    strip = np.concatenate([target.images[None, :rows], edited[:, :rows]]).swapaxes(0, 1)
    picture = image_grid(
        strip.reshape(-1, *strip.shape[2:]), columns=len(strengths) + 1, row_labels=titles
    )
    if sharding.is_main_process():
        save_image(folder / "strips.png", picture)
        save_image(folder / "grid.png", _pairs(target.images, crossed))
    scores = {judge.attribute.name: judge.score(target.images) for judge in judges}
    return {
        "attribute": judges[0].attribute.name,
        "t": t,
        "rule": section.rule if mixing else "given",
        "chosen_by": mixing["chosen_by"] if mixing else None,
        "boundary": quality,
        "validation": curve,
        "strength": chosen,
        "num_edited": len(target),
        "flip_rate": flip_rate(target.sides, judges[0].score(crossed)),
        "pixel_distance": pixel_distance(crossed, target.images),
        "leakage": leakage(scores, {j.attribute.name: j.score(crossed) for j in judges}),
        "strengths": _by_strength(strengths, edited, target, judges, scores),
        "monotonicity": monotonicity(strengths, np.stack([judges[0].score(x) for x in edited])),
        "inversion": _inversion_error(target.latents, down),
        "psnr_autoencoder": psnr(plain, target.images),
        "psnr_round_trip": psnr(unedited, target.images),
        "seconds": {"fit": fit_seconds, "per_image_and_strength": seconds},
        "eta": section.eta,
    }


# ---- states to fit on


def _fit_states(
    editor: Editor, config: ConfigDict, judge: Judge, train: ImageSource, fitted, t: float
) -> tuple[np.ndarray, np.ndarray]:
    """States at `t` to fit on, from the source that the config names, with their sides."""
    section = config.edit
    if section.source == "sampled":
        return _sampled_states(editor, judge, section.num_fit, t)
    if fitted is None:
        indices, sides = split_sides(
            judge, train, count=section.num_fit, held_out=0, seed=section.seed
        )[0]
        fitted = of_source(editor, train, indices, sides)
    if section.source == "noised":
        return editor.noised(fitted.latents, t, positions=fitted.positions), fitted.sides
    return editor.invert(fitted.latents, t), fitted.sides


def _sampled_states(editor: Editor, judge: Judge, count: int, t: float):
    """States of generated samples with the sides that the judge sees in their images."""
    states, ends = editor.sampled(np.arange(count), (t,))
    images = editor.decode(ends)
    kept = judge.belongs(images)
    return states[0][kept], np.where(judge.score(images) > 0, 1, -1)[kept]


def _cross(editor, config, judge, fitted: Examples, validation: Examples, t: float):
    """Accuracy and AUC in z of a boundary of each source on held-out states of each."""
    from lfm_jax.boundary import fit

    section = config.edit
    made = _sampled_states(editor, judge, min(section.num_fit, _MOST_SAMPLED), t)
    half = len(made[1]) // 2
    data = {
        "inverted": (
            (editor.invert(fitted.latents, t), fitted.sides),
            (editor.invert(validation.latents, t), validation.sides),
        ),
        "noised": tuple(
            (editor.noised(x.latents, t, positions=x.positions), x.sides)
            for x in (fitted, validation)
        ),
        "sampled": tuple(
            (made[0][part], made[1][part]) for part in (slice(half), slice(half, None))
        ),
    }
    table = {}
    for name, (train, _) in data.items():
        try:
            boundary: Boundary = fit(*train, method=section.method, cost=section.cost)
            table[name] = {other: boundary.measure(*held) for other, (_, held) in data.items()}
        except UserError as error:  # too few samples of a side are no mistake of the user's
            table[name] = {"left_out": str(error)}
    return table


# ---- figures and pictures


def _inversion_error(latents: np.ndarray, back: np.ndarray) -> dict[str, float]:
    """Of the way up to the time and down again, in latents: what the solver costs."""
    rmse = float(np.sqrt(np.mean((back - latents) ** 2)))
    return {"rmse": rmse, "relative": rmse / float(np.sqrt(np.mean(latents**2)))}


def _by_strength(strengths, edited, target: Examples, judges: list[Judge], before) -> list[dict]:
    rows = []
    for strength, images in zip(strengths, edited, strict=True):
        scores = {judge.attribute.name: judge.score(images) for judge in judges}
        own = scores[judges[0].attribute.name]
        rows.append(
            {
                "strength": strength,
                "positive": float(np.mean(own > 0)),
                "mean_score": float(np.mean(own)),
                "distance": pixel_distance(images, target.images),
                "psnr": psnr(images, target.images),
                "leakage": leakage(before, scores),
            }
        )
    return rows


def _titles(judge: Judge, sides: np.ndarray) -> list[str]:
    names = {-1: judge.attribute.negative, 1: judge.attribute.positive}
    return [names[int(side)] for side in sides]


def _pairs(images: np.ndarray, crossed: np.ndarray):
    """Originals over their edits, eight pairs a row."""
    columns = 8
    count = len(images) // columns * columns or len(images)
    columns = min(columns, count)
    rows = np.stack([images[:count], crossed[:count]]).reshape(2, -1, columns, *images.shape[1:])
    rows = rows.swapaxes(0, 1)
    names = ["original", "edited"] * len(rows)
    return image_grid(rows.reshape(-1, *images.shape[1:]), columns=columns, row_labels=names)


def _write(path, target: Examples, edited, crossed, strengths, chosen) -> None:
    if not sharding.is_main_process():
        return
    buffer = io.BytesIO()
    np.savez(
        buffer,
        arr_0=crossed,
        original=target.images,
        side=target.sides,
        by_strength=edited,
        strengths=np.array(strengths),
        strength=chosen,
    )
    write_bytes(path, buffer.getvalue())
