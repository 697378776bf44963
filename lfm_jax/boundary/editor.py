"""Images to states and back: everything an edit asks of the network, in whole batches.

An `Editor` holds a frozen network with its codec. Solves are second order and float32; a network
with classes is used at its null label unless a class is named. A random number is a function of the
seed and of the image's position, so neither the batch size nor the order changes an image.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, UInt8
from tqdm import tqdm

from lfm_jax import rng
from lfm_jax.boundary.hidden import Shifted, hidden_states
from lfm_jax.errors import UserError
from lfm_jax.flow import (
    NetworkVelocity,
    invert,
    invert_through,
    noised,
    sample,
    sample_sde,
    sample_through,
)
from lfm_jax.models import Cond
from lfm_jax.vae import Codec, from_uint8, to_uint8

Latents = Float[np.ndarray, "n h w c"]
Places = Integer[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """A frozen flow, ready to take images up to a time and states down again.

    Attributes:
        model, params, codec: the network and the autoencoder.
        latent_shape: (h, w, c).
        image_size: side in pixels.
        solver: of both ways; second order keeps the round trip below the autoencoder's error.
        num_steps: over the whole of [0, 1]; a part of it takes its share.
        seed: of fresh noise.
        batch_size: rows a program; smaller inputs are filled up to it.
        progress: show a bar for what takes several batches.
    """

    model: nn.Module
    params: Any
    codec: Codec
    latent_shape: tuple[int, int, int]
    image_size: int
    solver: str = "midpoint"
    num_steps: int = 24
    seed: int = 0
    batch_size: int = 128
    progress: bool = True

    @property
    def t_max(self) -> float:
        """The largest time of the network."""
        return self.model.t_max

    @property
    def null(self) -> int | None:
        """The null label, or None for an unconditional network."""
        return self.model.num_classes or None

    def steps(self, span: float) -> int:
        """Steps that a part of [0, 1] takes."""
        return max(2, math.ceil(self.num_steps * span))

    def encode(self, images: UInt8[np.ndarray, "n H W C"]) -> Latents:
        """Scaled latents (the posterior's mean) of images.

        Raises:
            UserError: images of another size.
        """
        wanted = (self.image_size, self.image_size, self.codec.image_channels)
        if images.shape[1:] != wanted:
            raise UserError(f"images of shape {images.shape[1:]}; this network edits {wanted}")
        return self._run("encode", lambda x: _encode(self.codec, x), images)

    def decode(self, latents: Latents) -> UInt8[np.ndarray, "n H W C"]:
        """Images of scaled latents."""
        return self._run("decode", lambda z: _decode(self.codec, z), latents)

    def invert(self, latents: Latents, t: float, *, labels: Any = None) -> Latents:
        """The states at `t` whose flow ends in `latents`."""
        options = {"t": t, "solver": self.solver, "num_steps": self.steps(t)}
        return self._run(
            "invert",
            lambda x, y: invert(self._velocity(y), x, **options)[0],
            latents,
            self._labels(labels, len(latents)),
        )

    def invert_through(
        self, latents: Latents, times: Sequence[float]
    ) -> Float[np.ndarray, "k n h w c"]:
        """The same at each of the rising `times`."""
        options = {"solver": self.solver, "num_steps": self.steps(times[-1])}
        states = self._run(
            "invert",
            lambda x, y: invert_through(self._velocity(y), x, times, **options).swapaxes(0, 1),
            latents,
            self._labels(None, len(latents)),
        )
        return states.swapaxes(0, 1)

    def noised(self, latents: Latents, t: float, *, positions: Places) -> Latents:
        """`latents` at `t` with fresh noise keyed by `positions`."""
        return self._run(
            "noise",
            lambda x, i: noised(x, self._keys(rng.Stream.NOISE, i), t=t),
            latents,
            np.asarray(positions, np.uint32),
        )

    def sampled(
        self, indices: Places, times: Sequence[float]
    ) -> tuple[Float[np.ndarray, "k n h w c"], Latents]:
        """States at `times` of generated samples, and their latents at the end of the way."""

        def make(i, y):
            velocity = self._velocity(y)
            noise = rng.normal(self._keys(rng.Stream.SAMPLE, i), self.latent_shape)
            options = {"solver": self.solver, "num_steps": self.num_steps}
            states = sample_through(velocity, noise, times, **options)
            down = self.steps(times[0])
            end, _ = sample(
                velocity, states[0], t_start=times[0], solver=self.solver, num_steps=down
            )
            return jnp.concatenate([states, end[None]]).swapaxes(0, 1)

        indices = np.asarray(indices, np.uint32)
        made = self._run("sample", make, indices, self._labels(None, len(indices)))
        made = made.swapaxes(0, 1)
        return made[:-1], made[-1]

    def hidden(
        self, states: Latents, t: float, layers: Sequence[str], *, pool: str = "mean"
    ) -> dict[str, np.ndarray]:
        """Pooled hidden states at `states`, `t`, by layer."""

        def read(x, y):
            time = jnp.full(x.shape[:1], t, jnp.float32)
            return hidden_states(self._velocity(y), x, time, tuple(layers), how=pool)

        return self._run("hidden", read, states, self._labels(None, len(states)))

    def generate(
        self,
        states: Latents,
        t: float,
        *,
        eta: float = 0.0,
        positions: Places | None = None,
        labels: Any = None,
        deltas: dict[str, np.ndarray] | None = None,
        window: tuple[float, float] = (0.0, 1.0),
        draw: int = 0,
    ) -> Latents:
        """Latents of the states at `t`.

        Args:
            eta: 0 follows the ODE; up to 1 (ancestral) puts fresh noise in on the way, with the
                same marginals.
            positions: whose noise, for ``eta > 0``.
            labels: a class or one a state; None is the null label.
            deltas: added to hidden states inside `window`; see `Shifted`.
            draw: number of the fresh noise, for several completions of one state.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta: {eta} is not in [0, 1]")
        if positions is None:
            positions = np.arange(len(states))
        steps = self.steps(t)

        def down(x, y, i, deltas):
            velocity = self._velocity(y)
            if deltas:
                velocity = Shifted(velocity, deltas, window)
            if eta == 0:
                return sample(velocity, x, t_start=t, solver=self.solver, num_steps=steps)[0]
            keys = jax.vmap(lambda k: jax.random.fold_in(k, draw))(self._keys(rng.Stream.SDE, i))
            # One evaluation a step where the ODE's solver makes two: twice the steps.
            options = {"method": "ddim", "eta": eta, "num_steps": 2 * steps, "t_start": t}
            return sample_sde(velocity, x, keys, **options)[0]

        return self._run(
            "generate",
            down,
            np.asarray(states, np.float32),
            self._labels(labels, len(states)),
            np.asarray(positions, np.uint32),
            dict(deltas or {}),
        )

    def _velocity(self, labels: Any) -> NetworkVelocity:
        cond = Cond(label=labels) if self.null else None
        return NetworkVelocity(
            params=self.params, cond=cond, model=self.model, t_max=self.model.t_max
        )

    def _labels(self, labels: Any, rows: int) -> np.ndarray:
        if labels is not None and self.null is None:
            raise UserError("label: this network is unconditional; it has no classes to name")
        labels = (self.null or 0) if labels is None else labels
        return np.broadcast_to(np.asarray(labels, np.int32), (rows,))

    def _keys(self, stream: rng.Stream, positions: Any) -> Any:
        return rng.stream_keys(jax.random.key(self.seed), stream, positions)

    def _run(self, what: str, function: Callable, *rows: Any) -> Any:
        """`function` over batches of the rows, on the host."""
        total = len(jax.tree.leaves(rows)[0])
        size = min(self.batch_size, total)
        parts = []
        bar = tqdm(
            range(0, total, size),
            desc=what,
            unit="batch",
            disable=not self.progress or total <= size,
        )
        for start in bar:
            part = jax.tree.map(lambda a, s=start: _filled(a[s : s + size], size), rows)
            made = jax.device_get(function(*part))
            kept = min(size, total - start)
            parts.append(jax.tree.map(lambda a, k=kept: a[:k], made))
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def _filled(rows: Any, size: int) -> jax.Array:
    """Repeats the last row, so that one program serves all batches."""
    rows = np.asarray(rows)
    missing = size - len(rows)
    return jnp.asarray(np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]))


@jax.jit
def _encode(codec: Codec, images):
    mean = codec.encode_moments(from_uint8(images))[..., : codec.latent_channels]
    return (mean - codec.shift) * codec.scale


@jax.jit
def _decode(codec: Codec, latents):
    return to_uint8(codec.decode(latents))
