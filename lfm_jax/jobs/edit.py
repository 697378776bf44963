"""Move images across the boundary of an attribute: fit, cross once, go on sampling. No training.

Everything that is chosen (the boundary, the mixing time, the strength) is chosen on training images
before an image to edit is read. Writes ``DIR/edit/``: ``boundary_<n>_<space>.npz`` of each
attribute, ``mixing.json`` and ``mixing.png``, ``edited.npz``, ``strips.png``, ``grid.png``.
"""

import io
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.boundary import load_boundary, save_boundary
from lfm_jax.boundary.crossing import Crossing, Space, fit_space, place
from lfm_jax.boundary.editor import Editor
from lfm_jax.boundary.hyperplane import MIN_SIDE, Boundary, check_sides
from lfm_jax.boundary.judges import (
    Judge,
    class_judge,
    pixel_judge,
    split_sides,
    table_judge,
    take_sides,
    text_judge,
)
from lfm_jax.boundary.measure import flip_rate, leakage, monotonicity, pixel_distance, psnr
from lfm_jax.boundary.pictures import mixing_picture
from lfm_jax.boundary.search import (
    Examples,
    away,
    edit_curve,
    examples,
    search_time,
    smallest_strength,
)
from lfm_jax.data import ImageSource, open_images
from lfm_jax.data.attributes import parse_attribute
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, origin
from lfm_jax.jobs.judge import judge as open_judge
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image, write_bytes, write_json

_MOST_SAMPLED = 300  # generated samples for the comparison of sources
FLIP_LEVEL = 0.85  # of the validation images: what the chosen strength must flip


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    sections = build.section(config, "data", "model", "autoencoder", "edit")
    del sections["data"]["path"], sections["edit"]["batch_size"]
    params = origin.initial_params(str(base(config, workdir).root))
    return {"checkpoint": checkpoints.fingerprint(params), **sections}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.edit
    judges = make_judges(config, workdir)
    editor = make_editor(config, workdir)
    way = crossing(config)
    parts = way.space.parts(editor)
    folder = workdir.root / "edit"

    # ---- images to fit with and to choose with; none of those to edit
    train = build.images(config, "train")
    sets = split_sides(
        judges[0], train, count=section.num_fit, held_out=section.num_validation, seed=section.seed
    )
    for (_, sides), least in zip(sets, (MIN_SIDE, 1), strict=True):
        check_sides(sides, attribute=judges[0].attribute.name, least=least)
    fitted, validation = (_examples(editor, train, *chosen) for chosen in sets)

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
        if len(parts) > 1 or len(judges) > 1:
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

    # ---- the images to edit
    target = _targets(config, editor, judges[0])
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


# ---- what the config names


def base(config: ConfigDict, workdir: Workdir) -> Workdir:
    """The workdir whose network is edited with: ``config.init``, or the run's own."""
    return Workdir(epath.Path(config.init)) if config.init else workdir


def make_editor(config: ConfigDict, workdir: Workdir) -> Editor:
    """The frozen network and its codec.

    Raises:
        UserError: no weights, a condition that editing does not have.
    """
    section, source = config.edit, base(config, workdir)
    codec = build.codec(config, source)
    params = origin.initial_params(str(source.root))
    return Editor(
        model=build.network(config),
        params=jax.tree.map(jnp.asarray, params),
        codec=codec,
        latent_shape=build.latent_shape(config, codec),
        image_size=config.data.image_size,
        solver=section.solver,
        num_steps=section.num_steps,
        seed=section.seed,
        batch_size=section.batch_size,
    )


def crossing(config: ConfigDict) -> Crossing:
    """The edit that `config.edit` describes."""
    section = config.edit
    return Crossing(
        space=Space(name=section.space, layer=section.layer, pool=section.pool),
        mode=section.mode,
        unit=section.unit,
        weights=(1.0, *(float(weight) for weight in section.also_weights)),
        hidden_weight=section.hidden_weight,
        window=tuple(section.window),
        eta=section.eta,
    )


def magnitudes(config: ConfigDict) -> list[float]:
    """Rising magnitudes of the strengths, without 0."""
    return sorted({abs(float(s)) for s in config.edit.strengths} - {0.0})


def make_judges(config: ConfigDict, workdir: Workdir) -> list[Judge]:
    """Of the attribute, of those that go with it, and of those that are only watched.

    Raises:
        UserError: an attribute that is unset or that the images do not have.
    """
    section = config.edit
    if section.attribute is None:
        raise UserError("--config.edit.attribute is unset: expected e.g. pair:7/9 or pixels:slant")
    parsed = [parse_attribute(a) for a in (section.attribute, *section.also, *section.leakage)]
    train = build.images(config, "train")
    extractor, judges = None, []
    for attribute in parsed:
        if attribute.kind in ("pair", "class"):
            class_judge(attribute, train.class_names, extractor)  # names are checked first
            if extractor is None:
                borrow_extractors(base(config, workdir), workdir)
                extractor, _ = open_judge(config, workdir)
            judges.append(class_judge(attribute, train.class_names, extractor))
        elif attribute.kind == "pixels":
            judges.append(pixel_judge(attribute, train))
        elif attribute.kind == "table":
            if section.table is None:
                raise UserError(
                    f"--config.edit.table is unset: {attribute.name} is a column of a table"
                )
            test = build.images(config, "test")
            options = {
                "epochs": config.evaluate.classifier_epochs,
                "seed": config.evaluate.classifier_seed,
            }
            judges.append(table_judge(attribute, section.table, train, test, **options))
        else:
            judges.append(text_judge(attribute, _similarity(config, attribute)))
    return judges


def borrow_extractors(source: Workdir, workdir: Workdir) -> None:
    """The classifier that the base was judged by judges here too; the base is only read."""

    def copy(folder: epath.Path, target: epath.Path) -> None:
        for path in folder.iterdir():
            if path.is_dir():
                copy(path, target / path.name)
            elif not (target / path.name).exists():
                write_bytes(target / path.name, path.read_bytes())

    own = source.root == workdir.root
    if sharding.is_main_process() and not own and source.extractors.exists():
        copy(source.extractors, workdir.extractors)


def _similarity(config: ConfigDict, attribute):
    from lfm_jax.boundary.text import text_similarity

    if config.edit.clip is None:
        raise UserError(
            f"--config.edit.clip is unset: {attribute.name} needs a folder of CLIP weights"
        )
    return text_similarity(config.edit.clip, (attribute.negative, attribute.positive))


# ---- images


def _examples(editor: Editor, source: ImageSource, indices, sides) -> Examples:
    return examples(editor, source.batch(indices)["image"], sides, indices)


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
        fitted = _examples(editor, train, indices, sides)
    if section.source == "noised":
        return editor.noised(fitted.latents, t, positions=fitted.positions), fitted.sides
    return editor.invert(fitted.latents, t), fitted.sides


def _sampled_states(editor: Editor, judge: Judge, count: int, t: float, first: int = 0):
    """States of generated samples with the sides that the judge sees in their images."""
    states, ends = editor.sampled(first + np.arange(count), (t,))
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


def _targets(config: ConfigDict, editor: Editor, judge: Judge) -> Examples:
    """The images to edit and the sides that they are on.

    Raises:
        UserError: no such images, or of another size.
    """
    section = config.edit
    kind, _, listed = section.images.partition(":")
    if section.images == "sampled":
        indices = np.arange(section.count)
        _, latents = editor.sampled(indices, (editor.t_max,))
        images = editor.decode(latents)
        sides = np.where(judge.score(images) > 0, 1, -1)
        return Examples(images=images, latents=latents, sides=sides, positions=indices)
    if kind in ("test", "train"):
        source = build.images(config, kind)
        if not listed:
            indices, sides = take_sides(judge, source, count=section.count, seed=section.seed)
        else:
            indices = _listed(section.images, listed, len(source))
            sides = judge.sides(source, indices)
            seen = np.where(judge.score(source.batch(indices)["image"]) > 0, 1, -1)
            sides = np.where(sides == 0, seen, sides)
        return _examples(editor, source, indices, sides)
    images = _read_files(section.images, config, editor)[: section.count]
    sides = np.where(judge.score(images) > 0, 1, -1)
    return examples(editor, images, sides, np.arange(len(images)))


def _listed(text: str, listed: str, size: int) -> np.ndarray:
    try:
        indices = np.array([int(part) for part in listed.split(",")])
    except ValueError:
        raise UserError(
            f"--config.edit.images={text}: expected indices such as test:3,17"
        ) from None
    for index in indices:
        if not 0 <= index < size:
            raise UserError(f"--config.edit.images={text}: index {index} is not in 0..{size - 1}")
    return indices


def _read_files(path: str, config: ConfigDict, editor: Editor) -> np.ndarray:
    """Image files as they are: cropping a user's image without a word would edit another."""
    place = Path(path).expanduser()
    channels = config.data.channels
    if place.is_dir():
        source = open_images("folder", path=path, channels=channels)
        return source.batch(np.arange(min(len(source), config.edit.count)))["image"]
    if not place.is_file():
        raise UserError(
            f"--config.edit.images={path}: expected test, train, test:3,17, sampled, or a file or "
            "folder of images"
        )
    from lfm_jax.data.pixels import Preprocess

    image = Preprocess(channels=channels).encoded(place.read_bytes(), path)
    wanted = (editor.image_size, editor.image_size, channels)
    if image.shape != wanted:
        raise UserError(
            f"--config.edit.images={path}: an image of {image.shape[0]}x{image.shape[1]} pixels; "
            f"this network edits {wanted[0]}x{wanted[1]}"
        )
    return image[None]


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
