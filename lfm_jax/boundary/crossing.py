"""Boundaries fitted and applied through an `Editor`: in the latent, in hidden states, or in both.

`Space` says where; `fit_space` gives its boundaries at a time, `Crossing` is one edit, complete.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Num

from lfm_jax.boundary.editor import Editor, Latents
from lfm_jax.boundary.hidden import check_window, default_layer, hidden_delta
from lfm_jax.boundary.hyperplane import Boundary, fit
from lfm_jax.boundary.steer import steer
from lfm_jax.errors import UserError

SPACES = ("z", "h", "both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Where boundaries are: ``z``, a hidden layer (``h``), or ``both``.

    Attributes:
        name: one of `SPACES`.
        layer: of the hidden state; empty for the middle of the network.
        pool: ``mean`` or ``flat``.
    """

    name: str = "z"
    layer: str = ""
    pool: str = "mean"

    def parts(self, editor: Editor) -> tuple[str, ...]:
        """``z`` and/or the layer's name.

        Raises:
            UserError: an unknown space, or a layer that the network does not have.
        """
        if self.name not in SPACES:
            raise UserError(f"space: {self.name!r} is none of {', '.join(SPACES)}")
        taps = editor.model.taps
        layer = self.layer or default_layer(taps)
        if self.name != "z" and layer not in taps:
            raise UserError(f"layer: {layer!r} is none of this network's {', '.join(taps)}")
        return {"z": ("z",), "h": (layer,), "both": ("z", layer)}[self.name]

    def read(self, editor: Editor, states: Latents, t: float) -> dict[str, np.ndarray]:
        """The states in every part of the space."""
        parts = self.parts(editor)
        layers = [part for part in parts if part != "z"]
        found = editor.hidden(states, t, layers, pool=self.pool) if layers else {}
        return {"z": states, **found} if "z" in parts else found


def fit_space(
    space: Space,
    editor: Editor,
    states: Latents,
    sides: Num[np.ndarray, " n"],
    t: float,
    *,
    provenance: dict[str, Any],
    **options: Any,
) -> dict[str, Boundary]:
    """A boundary in every part of the space at `t`; `options` and errors are those of `fit`."""
    return {
        part: fit(
            values,
            sides,
            provenance={**provenance, "t": float(t), **place(space, part)},
            **options,
        )
        for part, values in space.read(editor, states, t).items()
    }


def place(space: Space, part: str) -> dict[str, Any]:
    """A part of a space as a boundary's provenance names it."""
    return {"space": part, "pool": "flat" if part == "z" else space.pool}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossing:
    """One way to edit: where, how far, and how to go on.

    Attributes:
        space, mode, unit: see `Space` and `steer`.
        weights: share of the strength of each attribute; 0 keeps it where it is.
        hidden_weight: strength in the hidden state over the strength in the latent.
        window: times at which the hidden state is shifted.
        eta: noise on the way down.
    """

    space: Space = Space()
    mode: str = "project"
    unit: str = "margin"
    weights: tuple[float, ...] = (1.0,)
    hidden_weight: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0

    def apply(
        self,
        editor: Editor,
        boundaries: Sequence[dict[str, Boundary]],
        states: Latents,
        t: float,
        strength: float | int | Num[np.ndarray, " n"],
        *,
        positions: np.ndarray | None = None,
    ) -> Latents:
        """Latents of the edited states.

        Args:
            boundaries: of each attribute, by part of the space.
            states: at `t`.
            strength: of the first attribute with weight 1; a number or one a state.
            positions: whose noise, where ``eta > 0``.
        """
        rows = np.broadcast_to(np.asarray(strength, np.float64), (len(states),))
        strengths = rows[:, None] * np.asarray(self.weights, np.float64)
        kept = np.asarray(self.weights) == 0
        parts = self.space.parts(editor)
        how = {"mode": self.mode, "unit": self.unit}
        deltas = {}
        layers = [part for part in parts if part != "z"]
        hidden = editor.hidden(states, t, layers, pool=self.space.pool) if layers else {}
        for layer in layers:
            own = [each[layer] for each in boundaries]
            wanted = self._wanted(hidden[layer], own, strengths * self.hidden_weight, kept)
            deltas[layer] = np.asarray(hidden_delta(hidden[layer], own, wanted, **how))
        if "z" in parts:
            own = [each["z"] for each in boundaries]
            wanted = self._wanted(states, own, strengths, kept)
            states = np.asarray(steer(states, own, wanted, **how))
        return editor.generate(
            states,
            t,
            eta=self.eta,
            positions=positions,
            deltas=deltas,
            window=check_window(self.window),
        )

    def _wanted(self, values, boundaries, strengths, kept) -> np.ndarray:
        """`strengths`, where ``project`` must be told to leave the kept attributes' distance."""
        if self.mode != "project" or not kept.any():
            return strengths
        strengths = np.array(strengths)
        for k in np.flatnonzero(kept):
            one = boundaries[k]
            now = one.signed_distance(values)
            if self.unit == "margin":
                strengths[:, k] = now / one.spread
            else:
                strengths[:, k] = now - one.offset
        return strengths
