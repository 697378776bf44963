"""Hours and bytes of the large recipes by closed forms: estimates, nothing here was timed.

    hours = 6 x MACs of a forward pass x examples / (chips x stated peak x MFU)

`python -m benchmarks.tables` writes the table into docs/recipes.md.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from lfm_jax.experiments import neighbour
from lfm_jax.models import create_model, forward_macs
from lfm_jax.profiling import stated_peak

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "base.py"
MFU = 0.4
# name -> chips and what `stated_peak` calls one; a v4-32 or v5p-16 has two cores a chip
MACHINES = {
    "v4-32": (16, "TPU v4"),
    "v5p-16": (8, "TPU v5p"),
    "8 x H200": (8, "H200"),
    "1 x H200": (1, "H200"),
    "1 x A100": (1, "A100"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An experiment and where it would run."""

    config: str
    variant: str
    images: int
    machines: tuple[str, ...]
    steps: int = 0  # of the config's, unless told

    @property
    def name(self) -> str:
        return self.config + (f":{self.variant}" if self.variant else "")


POD = ("v4-32", "v5p-16", "8 x H200")
RECIPES = (
    Recipe("imagenet", "", 1_281_167, POD),
    Recipe("imagenet", "XL/2", 1_281_167, POD, steps=400_000),
    Recipe("imagenet", "XL/2", 1_281_167, POD),
    Recipe("celebahq", "", 27_000, ("1 x H200", "1 x A100")),
    Recipe("ffhq", "", 63_000, ("1 x H200", "1 x A100")),
    Recipe("lsun_church", "", 120_000, ("1 x H200", "1 x A100")),
    Recipe("lsun_bedroom", "", 120_000, ("1 x H200", "1 x A100")),
)


def train_flops(recipe: Recipe) -> tuple[float, int, int]:
    """FLOPs of an example's update, steps and batch."""
    config = neighbour(str(CONFIGS), f"{recipe.config}.py", recipe.variant)
    model = create_model(config.model.name, num_classes=config.data.num_classes)
    side = config.data.image_size // 8
    steps = recipe.steps or config.train.steps
    return 6.0 * forward_macs(model, (side, side, 4)), steps, config.train.batch_size


def hours(recipe: Recipe, machine: str) -> float:
    """Of training at `MFU`."""
    flops, steps, batch = train_flops(recipe)
    chips, kind = MACHINES[machine]
    peak = stated_peak(kind)
    assert peak is not None
    return flops * steps * batch / (chips * peak * MFU) / 3600


def latent_gigabytes(recipe: Recipe) -> float:
    """The cache with mirrors: mean and log-variance in float16, twice."""
    config = neighbour(str(CONFIGS), f"{recipe.config}.py", recipe.variant)
    side = config.data.image_size // 8
    return recipe.images * side * side * 4 * 2 * 2 * 2 / 1e9


def table() -> Iterator[str]:
    """One row a recipe."""
    yield f"| config | steps x batch | GFLOP an example | latents, GB | hours at {MFU:.0%} MFU |"
    yield "|---|---|---|---|---|"
    for recipe in RECIPES:
        flops, steps, batch = train_flops(recipe)
        times = ", ".join(f"{hours(recipe, m):.3g} ({m})" for m in recipe.machines)
        yield (
            f"| `{recipe.name}` | {steps:,} x {batch:,} | {flops / 1e9:.1f} | "
            f"{latent_gigabytes(recipe):.1f} | {times} |"
        )
