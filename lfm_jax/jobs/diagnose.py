"""What the flow itself is like, on held-out images: bound, likelihood, inversion, cost and quality.

- ``bound``: every term of the Wasserstein bound (`lfm_jax.flow.bound`), and which one dominates
- ``likelihood``: bits per dimension of the latents
- ``inversion``: error of going to noise and back, by evaluations; ``samples/switched.png`` shows
  images taken up and down again as other classes
- ``curve``: the Frechet distance of samples, by solver and evaluations, for the comparison page
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax import checkpoints, rng, sharding
from lfm_jax.errors import UserError
from lfm_jax.flow import (
    NetworkVelocity,
    bits_per_dim,
    draw_latents,
    interpolate,
    lipschitz_estimates,
    log_likelihood,
    reconstruction_errors,
    switch_class,
    target,
    velocity_profile,
    wasserstein_bound,
)
from lfm_jax.jobs import build, guide
from lfm_jax.jobs.cost_curve import curve, setting_of
from lfm_jax.jobs.judge import spread
from lfm_jax.jobs.sample_options import class_names
from lfm_jax.jobs.watch import write_curve
from lfm_jax.models import Cond
from lfm_jax.vae import Codec, from_uint8, to_uint8
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image

PARTS = ("bound", "likelihood", "inversion", "curve")
# Which constant stands for L in the bound's exponent; the last one is the sharpest.
CONSTANTS = ("sup_lipschitz", "sup_one_sided", "int_lipschitz", "int_one_sided")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Held-out images, their latents (posterior samples, scaled), and the flow that meets them."""

    images: np.ndarray
    latents: jax.Array
    labels: jax.Array | None
    codec: Codec
    velocity: NetworkVelocity
    keys: jax.Array
    key: jax.Array

    def first(self, count: int) -> "Held":
        """The first rows of all of it."""
        cut = jax.tree.map(lambda x: x[:count], self.velocity.cond)
        return dataclasses.replace(
            self,
            images=self.images[:count],
            latents=self.latents[:count],
            labels=None if self.labels is None else self.labels[:count],
            velocity=dataclasses.replace(self.velocity, cond=cut),
            keys=self.keys[:count],
        )


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    sections = build.section(config, "diagnose", "sample", "evaluate")
    return {"checkpoint": workdir.checkpoint(), **sections}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.diagnose
    workdir.checkpoint()  # refused now where it is refused in the end
    unknown = [part for part in section.parts if part not in PARTS]
    if unknown or not section.parts:
        raise UserError(
            f"--config.diagnose.parts={tuple(section.parts)}: expected some of {', '.join(PARTS)}"
        )
    if config.condition.kind != "none":
        raise UserError(
            f"--config.condition.kind={config.condition.kind}: only flows without a condition "
            "beside the class can be diagnosed; expected none"
        )
    settings = [setting_of(text) for text in section.curve]
    if "curve" in section.parts:
        guide.check_null_label(config, workdir)
    params = checkpoints.load_params(workdir.checkpoints, ema=config.sample.ema)
    figures: dict[str, Any] = {
        "checkpoint_step": checkpoints.latest_step(workdir.checkpoints),
        "ema": config.sample.ema,
        "num_images": min(section.num_images, len(build.images(config, "test"))),
    }
    held = _held(config, workdir, params) if set(section.parts) != {"curve"} else None
    for part in tqdm(section.parts, desc="diagnose", unit="part"):
        if part == "curve":
            figures |= curve(config, workdir, params, settings)
        else:
            assert held is not None  # some part is not the curve
            figures[part] = {"bound": bound, "likelihood": likelihood, "inversion": inversion}[
                part
            ](config, workdir, held)
    return figures


def _held(config: ConfigDict, workdir: Workdir, params: Any) -> Held:
    test = build.images(config, "test")
    found = test.batch(spread(len(test), min(config.diagnose.num_images, len(test))))
    # The bound and the likelihood are forward-mode derivatives, which the fused kernel has not.
    codec, model = build.codec(config, workdir), build.network(config).clone(attention="xla")
    key = jax.random.key(config.sample.seed)
    rows = jnp.arange(len(found["image"]), dtype=jnp.uint32)

    @jax.jit
    def encode(codec, pixels):
        batch = {"moments": codec.encode_moments(from_uint8(pixels)), "position": rows}
        return draw_latents(batch, key, scale=codec.scale, shift=codec.shift)

    labels = None
    if config.data.num_classes:
        # The null class where an image has no label of its own.
        known = found["label"]
        labels = jnp.asarray(np.where(known < 0, config.data.num_classes, known), jnp.int32)
    velocity = NetworkVelocity(
        params=jax.tree.map(jnp.asarray, params),
        model=model,
        cond=Cond(label=labels),
        t_max=model.t_max,
    )
    return Held(
        images=found["image"],
        latents=encode(codec, found["image"]),
        labels=labels,
        codec=codec,
        velocity=velocity,
        keys=rng.stream_keys(key, rng.Stream.SAMPLE, rows),
        key=key,
    )


# ---- the bound


def bound(config: ConfigDict, workdir: Workdir, held: Held) -> dict[str, Any]:
    """Every term as an estimate, the side from which it is one, and the verdicts."""
    section = config.diagnose
    autoencoder_error = float(_reconstruction_error(held.codec, held.images, held.latents))
    velocity_error = float(_velocity_error(held.velocity, held.latents, held.key))
    few = held.first(section.points)
    decoder = float(
        lipschitz_estimates(
            _decode, few.codec, few.latents, few.keys, iterations=section.iterations
        ).max()
    )
    profile = velocity_profile(
        few.velocity,
        few.latents,
        few.key,
        times=np.linspace(0, 1, section.times),
        iterations=section.iterations,
    )
    diameter = _diameter(held.images)
    figures: dict[str, Any] = {
        "autoencoder_error": autoencoder_error,
        "velocity_error": velocity_error,
        "decoder_lipschitz": decoder,
        "diameter": diameter,
        "profile": profile,
        "estimates": {
            "autoencoder_error": f"mean of {len(held.images)} held-out images",
            "velocity_error": "from above: the whole loss, conditional variance included",
            "decoder_lipschitz": f"from below: largest of {section.points} points",
            "velocity_lipschitz": f"from below: largest of {section.points} points a time",
            "diameter": "from below: largest distance of two held-out images",
        },
    }
    for constant in CONSTANTS:
        found = wasserstein_bound(
            autoencoder_error=autoencoder_error,
            decoder_lipschitz=decoder,
            velocity_lipschitz=profile[constant],
            velocity_error=velocity_error,
            diameter=diameter,
        )
        figures[constant] = {
            "log_bound": found.log_total,
            "log_autoencoder": found.log_autoencoder,
            "log_flow": found.log_flow,
            "exponent": found.exponent,
            "dominating": found.dominating,
            "vacuous": found.vacuous,
            "verdict": found.verdict,
        }
    return figures


def _decode(codec: Codec, latents: jax.Array) -> jax.Array:
    return codec.decode(latents)


@jax.jit
def _reconstruction_error(codec: Codec, pixels: Any, latents: jax.Array) -> jax.Array:
    """``E|x - g(f(x))|^2``: the mean squared L2 norm of an image's error."""
    error = codec.decode(latents) - from_uint8(pixels)
    return jnp.mean(jnp.sum(jnp.square(error), axis=(1, 2, 3)))


@jax.jit
def _velocity_error(velocity: Any, x0: jax.Array, key: jax.Array) -> jax.Array:
    """The loss as a squared L2 norm, at stratified times."""
    rows = jnp.arange(len(x0), dtype=jnp.uint32)
    noise = rng.normal(rng.stream_keys(key, rng.Stream.NOISE, rows), x0.shape[1:])
    t = (rows + rng.uniform(rng.stream_keys(key, rng.Stream.TIME, rows))) / len(x0)
    t = jax.random.permutation(key, t)  # apart from the order of the images
    error = velocity(interpolate(x0, noise, t), t) - target(x0, noise)
    return jnp.mean(jnp.sum(jnp.square(error), axis=(1, 2, 3)))


def _diameter(images: np.ndarray) -> float:
    """Largest L2 distance of two images on [-1, 1]."""
    flat = np.asarray(from_uint8(images), np.float64).reshape(len(images), -1)
    squares = (flat**2).sum(1)
    distances = squares[:, None] + squares[None] - 2 * flat @ flat.T
    return float(np.sqrt(max(distances.max(), 0.0)))


# ---- likelihood


def likelihood(config: ConfigDict, workdir: Workdir, held: Held) -> dict[str, Any]:
    """Bits per dimension of held-out latents, at the flow's scale and unscaled."""
    section = config.diagnose
    log_p, stats = log_likelihood(
        held.velocity,
        held.latents,
        held.keys if section.probes else None,
        num_probes=max(section.probes, 1),
        solver="rk4",
        num_steps=section.likelihood_steps,
    )
    dims = int(np.prod(held.latents.shape[1:]))
    bits = np.asarray(bits_per_dim(log_p, dims))
    return {
        "bits_per_dim": float(bits.mean()),
        "standard_error": float(bits.std(ddof=1) / np.sqrt(len(bits))),
        "bits_per_dim_unscaled": float(np.mean(bits_per_dim(log_p, dims, scale=held.codec.scale))),
        "trace": f"Hutchinson, {section.probes} probes" if section.probes else "exact",
        "nfe": int(np.max(stats["nfe"])),
        # A standard normal of as many dimensions has half log2(2 pi e) = 2.05 bits.
        "noise_rms": float(jnp.sqrt(jnp.mean(jnp.square(stats["noise"])))),
    }


# ---- inversion


def inversion(config: ConfigDict, workdir: Workdir, held: Held) -> dict[str, Any]:
    """Round-trip errors, and a picture of images as other classes."""
    section = config.diagnose
    rows = reconstruction_errors(
        held.velocity, held.latents, num_steps=tuple(section.inversion_steps)
    )
    points = [[row["nfe"], row["relative"]] for row in rows]
    if sharding.is_main_process():
        write_curve(workdir, "inversion error over NFE", points)
        if section.switched and config.data.num_classes:
            save_image(workdir.samples / "switched.png", _switched(config, held))
    return {"solver": "midpoint", "rows": rows}


def _switched(config: ConfigDict, held: Held) -> Any:
    """A row an image: itself, then taken up to `switch_t` and down again as each class."""
    section, names = config.diagnose, class_names(config)
    few = held.first(section.switched)
    columns = [few.images]
    for label in range(len(names)):
        latents, _ = switch_class(
            few.velocity, few.latents, label, t=section.switch_t, num_steps=16
        )
        columns.append(np.asarray(_pictures(few.codec, latents)))
    cells = np.stack(columns, axis=1).reshape(-1, *few.images.shape[1:])
    return image_grid(cells, columns=len(columns))


@jax.jit
def _pictures(codec: Codec, latents: jax.Array) -> jax.Array:
    return to_uint8(codec.decode(latents))
