"""Move images across the boundary of an attribute: fit, cross once, go on sampling. No training.

Everything that is chosen (the boundary, the mixing time, the strength) is chosen on training images
alone. Writes ``DIR/edit/``: ``boundary_<n>_<space>.npz`` of each attribute, ``mixing.json`` and
``mixing.png``, ``edited.npz``, ``strips.png``, ``grid.png``.
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
from lfm_jax.boundary.hyperplane import MIN_SIDE, check_sides
from lfm_jax.boundary.judges import Judge, split_sides
from lfm_jax.boundary.measure import flip_rate, leakage, monotonicity, pixel_distance, psnr
from lfm_jax.boundary.pictures import mixing_picture
from lfm_jax.boundary.search import Examples, away, edit_curve, search_time, smallest_strength
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, origin
from lfm_jax.jobs.edit_states import cross_sources, fit_states
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
        if len(parts) != 1 or section.also:
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
        states, own = fit_states(editor, config, judge, train, fitted if number == 0 else None, t)
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
        quality["cross"] = cross_sources(editor, config, judges[0], fitted, validation, t)

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
