"""The pictures of the concept pages, made by the code that the pages describe.

    python -m benchmarks.pictures path
    python -m benchmarks.pictures latents runs/fashion_mnist
    python -m benchmarks.pictures guidance runs/fashion_mnist
    python -m benchmarks.pictures evaluation runs/fashion_mnist
    python -m benchmarks.pictures scaling
    python -m benchmarks.pictures reliability

They are written to docs/pictures/. `latents`, `guidance` and `evaluation` need a finished workdir,
`scaling` and `reliability` what `benchmarks.aot` and `benchmarks.reliability` have written.
"""

import json
import sys

import flax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from benchmarks.figures import RESULTS
from lfm_jax import checkpoints, flow
from lfm_jax.config import default_config
from lfm_jax.evaluate import FeatureStatistics, frechet_of
from lfm_jax.jobs import build, judge
from lfm_jax.jobs.generate import Generator
from lfm_jax.vae import from_uint8, to_uint8
from lfm_jax.workdir import Workdir

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = RESULTS.parent / "pictures"
_MEANS, _STD = (-1.5, 0.3, 1.6), 0.12
_SCALES = (1.0, 1.5, 2.5, 4.0, 8.0)
_COUNTS = (250, 500, 1000, 2000, 4000, 10_000)


@flax.struct.dataclass
class MixtureVelocity:
    """The exact velocity of the linear path from noise to a mixture of three narrow Gaussians.

    ``v(x, t) = sum_k p(k | x) (c'_k + (s_k' / s_k) (x - c_k))`` with the component's mean
    ``c_k = (1-t) m_k`` and deviation ``s_k^2 = (1-t)^2 s^2 + t^2`` at time t.
    """

    t_max: float = flax.struct.field(pytree_node=False, default=1.0)
    network_calls: int = flax.struct.field(pytree_node=False, default=1)

    def __call__(self, x: Float[Array, "b 1"], t: Float[Array, " b"]) -> Float[Array, "b 1"]:
        t = t[:, None]
        means = jnp.asarray(_MEANS)
        variance = ((1 - t) * _STD) ** 2 + t**2
        centred = x - (1 - t) * means
        weights = jax.nn.softmax(-0.5 * centred**2 / variance, axis=-1)
        growth = (t - (1 - t) * _STD**2) / variance
        return jnp.sum(weights * (growth * centred - means), axis=-1, keepdims=True)


def path() -> None:
    """Trajectories of the exact flow, and what 2, 4 and 8 Euler steps make of them."""
    noise = jnp.asarray(np.linspace(-2.2, 2.2, 23)[:, None], jnp.float32)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True)
    times = np.linspace(1, 0, 201)
    grid = np.linspace(-3, 3, 301)
    for axis, steps in zip(axes, (200, 2, 4, 8), strict=True):
        density = np.stack([_density(grid, t) for t in times], axis=1)
        axis.imshow(density**0.4, extent=(1, 0, -3, 3), origin="lower", aspect="auto", cmap="Blues")
        walk = flow.trajectory(
            MixtureVelocity(), noise, count=steps + 1, solver="euler", num_steps=steps
        )
        axis.plot(walk["t"], walk["x"][..., 0], color="black", lw=0.7)
        axis.set_title("the flow" if steps == 200 else f"{steps} Euler steps")
        axis.set_xlabel("t")
        axis.set_xlim(1, 0)
    axes[0].set_ylabel("x")
    _save(figure, "path")


def _density(x: np.ndarray, t: float) -> np.ndarray:
    variance = ((1 - t) * _STD) ** 2 + t**2
    parts = [np.exp(-0.5 * (x - (1 - t) * m) ** 2 / variance) for m in _MEANS]
    density = np.sum(parts, axis=0)
    return density / density.max()


def latents(workdir: str) -> None:
    """Held-out images, the channels of their latents, and what the decoder makes of these."""
    config, place = _run(workdir)
    codec = build.codec(config, place)
    source = build.images(config, "test")
    images = source.batch(np.arange(8))["image"]
    z = (codec.encode_moments(from_uint8(images))[..., : codec.latent_channels] - codec.shift) * (
        codec.scale
    )
    rebuilt = np.asarray(to_uint8(codec.decode(z)))
    rows = [images, *np.moveaxis(np.asarray(z), -1, 0), rebuilt]
    names = ["image", *(f"latent {i}" for i in range(z.shape[-1])), "decoded"]
    figure, axes = plt.subplots(len(rows), len(images), figsize=(len(images), len(rows)))
    for line, row, name in zip(axes, rows, names, strict=True):
        for axis, image in zip(line, row, strict=True):
            if image.ndim == 2:
                axis.imshow(image, cmap="RdBu", vmin=-3, vmax=3)
            else:
                axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    _save(figure, "latents")


def guidance(workdir: str) -> None:
    """The same noise and classes under growing guidance, a row a scale."""
    config, place = _run(workdir)
    params = checkpoints.load_params(place.checkpoints)
    labels = np.arange(config.data.num_classes, dtype=np.int32)
    figure, axes = plt.subplots(
        len(_SCALES), len(labels), figsize=(len(labels), 1.05 * len(_SCALES))
    )
    for line, scale in zip(axes, _SCALES, strict=True):
        config.sample.guidance = scale
        images, _, _ = Generator.from_config(config, place)(params, range(len(labels)), labels)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(f"scale {scale:g}", rotation=0, ha="right", va="center")
    _save(figure, "guidance")


def evaluation(workdir: str) -> None:
    """The Frechet distance of real images, reconstructions and samples against their number."""
    config, place = _run(workdir)
    extractor, _ = judge.judge(config, place)
    look = judge.Look(extractor=extractor)
    train, test = build.images(config, "train"), build.images(config, "test")
    real = look(judge.of_source(test, np.arange(len(test))), len(test), "held-out")
    count = config.sample.num_samples
    order = np.random.default_rng(0).permutation(len(test))[:count]
    with np.load(place.samples / "samples.npz") as file:
        made = file["arr_0"][np.random.default_rng(0).permutation(len(file["arr_0"]))]
    seen = np.random.default_rng(0).permutation(len(train))[:count]
    rebuilt = judge.reconstructed(build.codec(config, place), judge.of_source(test, order))
    lines = {
        "samples": look(judge.of_array(made), len(made), "samples"),
        "held-out images, reconstructed": look(rebuilt, len(order), "reconstructions"),
        "real training images": look(judge.of_source(train, seen), len(seen), "train"),
    }
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, found in lines.items():
        counts = [n for n in _COUNTS if n <= len(found.features)]
        distances = [
            frechet_of(FeatureStatistics.of(found.features[:n]), real.statistics) for n in counts
        ]
        axis.loglog(counts, distances, "o-", label=name)
    axis.set_xlabel(f"images, against {len(test):,} held-out ones")
    axis.set_ylabel(f"FD-{extractor.name}")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, "evaluation")


def scaling() -> None:
    """Memory of a chip in a training step of DiT-XL/2 by kind, as the TPU compiler counts it."""
    programs = json.loads((RESULTS / "scale_aot.json").read_text())["programs"]
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(programs) + 1.4))
    names = [f"{p['topology']}, fsdp {p['fsdp']}, remat {p['remat']}" for p in programs]
    state = np.array([p["state"] for p in programs]) / 2**30
    needed = np.array([p["needed"] for p in programs]) / 2**30
    axis.barh(names, state, color="C0", label="state")
    axis.barh(names, needed - state, left=state, color="C1", label="the rest of the peak")
    for place, program in enumerate(programs):
        limit = program["hbm"] / 2**30
        axis.plot([limit, limit], [place - 0.4, place + 0.4], color="black")
    axis.plot([], [], color="black", label="what a chip has")
    axis.set_xlabel("GiB a chip, DiT-XL/2 in bfloat16, 16 images a chip")
    axis.legend(loc="lower right")
    _save(figure, "scaling")


def reliability() -> None:
    """In the middle of what the kills of each job struck it."""
    kills = json.loads((RESULTS / "reliability_faults.json").read_text())["kills"]
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for job, counts in reversed(kills.items()):
        moments = {k.removeprefix("while "): n for k, n in counts.items() if k.startswith("while ")}
        left = 0
        for moment, count in sorted(moments.items(), key=lambda m: (m[0] == "computing", -m[1])):
            colour = "lightgray" if moment == "computing" else "#9ecae1"
            axis.barh(job, count, left=left, color=colour, edgecolor="white")
            if count >= 8:
                axis.text(left + count / 2, job, moment, ha="center", va="center", fontsize=7)
            left += count
    axis.set_xlabel("kills, by what they struck in the middle")
    _save(figure, "reliability")


def _run(workdir: str) -> tuple[ConfigDict, Workdir]:
    """The config that a workdir was run with, on top of today's defaults."""
    place = Workdir(epath.Path(workdir))
    config = default_config()
    with config.unlocked():
        config.update(json.loads(place.config.read_text())["config"])
    return config, place


def _save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(pad=0.4)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    print(FOLDER / f"{name}.png")


PICTURES = {
    "path": path,
    "latents": latents,
    "guidance": guidance,
    "evaluation": evaluation,
    "scaling": scaling,
    "reliability": reliability,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PICTURES:
        sys.exit(f"expected one of {', '.join(PICTURES)}, then a workdir where it needs one")
    PICTURES[sys.argv[1]](*sys.argv[2:])
