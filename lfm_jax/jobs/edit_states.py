"""The states that a boundary is fitted on, from each source, and how the sources agree."""

import numpy as np
from ml_collections import ConfigDict

from lfm_jax.boundary.editor import Editor
from lfm_jax.boundary.hyperplane import Boundary
from lfm_jax.boundary.judges import Judge, split_sides
from lfm_jax.boundary.search import Examples
from lfm_jax.data import ImageSource
from lfm_jax.errors import UserError
from lfm_jax.jobs.editing import of_source

_MOST_SAMPLED = 300  # generated samples for the comparison of sources


def fit_states(
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


def cross_sources(editor, config, judge, fitted: Examples, validation: Examples, t: float):
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
