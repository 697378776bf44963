"""A small feature network for latents (or pixels): maps at several scales, masked and classified.

Raw latents are no space to compare samples in (Deng et al. 2026, "Drifting", section 5); a network
trained on them is. Each level is a residual block on a map half as wide as the last:

    x <- x + W gelu(conv3(LN(x)))

or, `plain`, two convolutions and a max-pool (Simonyan & Zisserman 2015), which sees other things:
samples that networks of one design cannot tell from data another one can.

It is trained on what is at hand: to fill in masked patches (a linear decoder from the deepest map,
half of the patches hidden; He et al. 2022), to name the class where there are labels, or both. Its
features are the hidden layer; ``maps`` holds mean and deviation over space of each level's
channels, which see the grain of an image where the hidden layer sees what it shows.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from tqdm import tqdm

from lfm_jax.errors import UserError
from lfm_jax.features.extractor import Extractor, read_params, write_params

OBJECTIVES = ("classify", "mask", "both")
_MASKED = 0.5


class FeatureEncoder(nn.Module):
    """``x [b, h, w, c]`` -> ``{"features" [b, hidden], "maps" [b, d], "logits" [b, classes]}``.

    Attributes:
        num_classes: 0 for no head.
        width: channels of the first level; doubled at each next one.
        levels: maps, each half as wide as the last.
        stem: the first convolution's stride (1 for latents, 2 for small images).
        hidden: features.
        patch: side of the squares that masking hides, in cells of the input.
        plain: levels ``x <- maxpool2(conv3(relu(conv3(relu(x)))))`` without norms or residuals.
    """

    num_classes: int = 0
    width: int = 32
    levels: int = 2
    stem: int = 1
    hidden: int = 128
    patch: int = 2
    plain: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], shown: Float[Array, "b h w 1"] | None = None
    ) -> dict[str, Array]:
        """Features of `x`; with `shown` (0 where hidden) also ``"filled"``, its guess at `x`."""
        shape = x.shape
        hole = self.param("hole", nn.initializers.zeros, (shape[-1],))
        if shown is not None:
            x = shown * x + (1 - shown) * hole
        size = 3 if self.stem == 1 else 2 * self.stem
        x = nn.Conv(self.width, (size, size), self.stem, name="stem")(x)
        moments = []
        for level in range(self.levels):
            width = self.width * 2**level
            if self.plain:
                x = nn.relu(nn.Conv(width, (3, 3), name=f"conv{level}")(nn.relu(x)))
                x = nn.Conv(width, (3, 3), name=f"mix{level}")(x)
                x = _halved(x)
            else:
                if level:
                    x = nn.Conv(width, (2, 2), 2, name=f"down{level}")(x)
                y = nn.LayerNorm(name=f"norm{level}")(x)
                y = nn.Conv(width, (3, 3), name=f"conv{level}")(y)
                x = x + nn.Dense(width, name=f"mix{level}")(nn.gelu(y))
            mean = x.mean((1, 2))
            moments += [mean, jnp.sqrt(jnp.square(x - mean[:, None, None]).mean((1, 2)) + 1e-6)]
        active = nn.relu if self.plain else nn.gelu
        deepest = active(x if self.plain else nn.LayerNorm(name="norm")(x))
        hidden = active(nn.Dense(self.hidden, name="hidden")(deepest.reshape(len(x), -1)))
        found = {"features": hidden, "maps": jnp.concatenate(moments, axis=-1)}
        if self.num_classes:
            found["logits"] = nn.Dense(self.num_classes, name="head")(hidden)
        if shown is not None or self.is_initializing():
            filled = nn.Dense(int(np.prod(shape[1:])), name="fill")(hidden)
            found["filled"] = filled.reshape(shape)
        return found


def _halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The largest of each 2x2, an odd edge repeated; on a CPU four times as fast as a pool."""
    b, h, w, c = x.shape
    if h % 2 or w % 2:
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    return x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).max((2, 4))


def train_encoder(
    read: Callable[[np.ndarray], dict[str, np.ndarray]],
    count: int,
    *,
    num_classes: int = 0,
    objective: str = "classify",
    noise: float | int = 0.0,
    seed: int = 0,
    steps: int = 800,
    batch_size: int = 128,
    learning_rate: float | int = 2e-3,
    progress: bool = True,
    **sizes: Any,
) -> tuple[FeatureEncoder, dict, float]:
    """Train a `FeatureEncoder`.

    Args:
        read: ``read(indices) -> {"x" float [b, h, w, c], "label" int [b]}``.
        count: rows that `read` knows.
        objective: of `OBJECTIVES`.
        noise: examples are seen with Gaussian noise of a deviation drawn from [0, `noise`] each.
        sizes: fields of `FeatureEncoder`.

    Returns:
        The network, its parameters, and the objective's mean over the last tenth of the steps.

    Raises:
        UserError: an unknown objective, or a class head without classes.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"encoder objective: {objective!r} is none of {', '.join(OBJECTIVES)}")
    if objective != "mask" and num_classes < 2:
        raise UserError(f"encoder objective: {objective} needs classes; unlabelled data take mask")
    model = FeatureEncoder(num_classes=num_classes, **sizes)
    key = jax.random.key(seed)
    example = read(np.arange(1))["x"]
    params = jax.jit(model.init)(key, jnp.asarray(example))["params"]
    tx = optax.adamw(optax.cosine_onecycle_schedule(steps, learning_rate), weight_decay=1e-2)
    opt_state = tx.init(params)
    step_fn = _make_step(model, tx, objective, noise)
    order = np.random.default_rng(seed)
    losses = []
    bar = tqdm(range(steps), desc=f"feature network {seed}", unit="step", disable=not progress)
    for step in bar:
        batch = read(np.sort(order.choice(count, min(batch_size, count), replace=False)))
        params, opt_state, loss = step_fn(
            params, opt_state, batch["x"], batch["label"], jax.random.fold_in(key, step)
        )
        losses.append(loss)
    return model, params, float(np.mean(losses[-max(steps // 10, 1) :]))


def _make_step(
    model: FeatureEncoder, tx: optax.GradientTransformation, objective: str, noise: float | int
):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, label, key):
        level, drawn = jax.random.split(jax.random.fold_in(key, 1))
        levels = noise * jax.random.uniform(level, (len(x), 1, 1, 1))
        seen = x + levels * jax.random.normal(drawn, x.shape)

        def loss_fn(params):
            total = 0.0
            if objective != "mask":
                logits = cast(dict[str, Array], model.apply({"params": params}, seen))["logits"]
                targets = optax.smooth_labels(jax.nn.one_hot(label, model.num_classes), 0.05)
                total += optax.softmax_cross_entropy(logits, targets).mean()
            if objective != "classify":
                b, h, w, _ = x.shape
                cells = (b, -(-h // model.patch), -(-w // model.patch), 1)
                shown = (jax.random.uniform(key, cells) >= _MASKED).astype(x.dtype)
                shown = shown.repeat(model.patch, 1).repeat(model.patch, 2)[:, :h, :w]
                out = cast(dict[str, Array], model.apply({"params": params}, seen, shown))
                error = jnp.square(out["filled"] - x) * (1 - shown)
                total += error.sum() / (jnp.sum(1 - shown) * x.shape[-1] + 1e-6)
            return total

        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def pixel_extractor(model: FeatureEncoder, params: dict, *, size: int, channels: int, name: str):
    """The `Extractor` of an encoder that was trained on images in [-1, 1]."""
    return Extractor(
        params=params,
        model=model,
        name=name,
        dim=model.hidden,
        input_size=size,
        channels=channels,
    )


def save_encoder(
    path: str | os.PathLike, model: FeatureEncoder, params: dict, **made_of: Any
) -> None:
    """Write an encoder with what it was made of (JSON)."""
    fields = ("num_classes", "width", "levels", "stem", "hidden", "patch", "plain")
    sizes = {name: getattr(model, name) for name in fields}
    write_params(path, params, {"sizes": sizes, "made_of": made_of})


def load_encoder(path: str | os.PathLike) -> tuple[FeatureEncoder, dict, dict]:
    """``(network, params, made_of)`` of `save_encoder`; `UserError` if it is not one."""
    params, metadata = read_params(path)
    if "sizes" not in metadata:
        raise UserError(f"feature network {path}: not one of save_encoder")
    return FeatureEncoder(**metadata["sizes"]), params, metadata["made_of"]
