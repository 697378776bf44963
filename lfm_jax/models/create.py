"""Networks by name, their parameters and their size.

`create_model("DiT-B/2", num_classes=1000)` or, sized freely,
`create_model("DiT", hidden=256, depth=8, heads=4, patch=2)`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from lfm_jax.errors import UserError, near
from lfm_jax.models import dit, macs
from lfm_jax.models.adm import ADM
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.ddpm import DDPM
from lfm_jax.models.dit import DiT
from lfm_jax.models.songunet import SongUNet
from lfm_jax.models.unet import UNet

# name -> (module, its preset fields)
NAMES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "DiT": (DiT, {}),
    **{
        f"DiT-{size}/{patch}": (
            DiT,
            {"hidden": hidden, "depth": depth, "heads": heads, "patch": patch},
        )
        for size, (hidden, depth, heads) in dit.SIZES.items()
        for patch in dit.PATCHES
    },
    "adm": (ADM, {}),
    "adm_context": (ADM, {"context_dim": 1024}),
    "unet": (UNet, {}),
    "unet_context": (
        UNet,
        {"context_dim": 512, "head_channels": 32, "attention_resolutions": (16, 8, 4)},
    ),
    "ddpm++": (SongUNet, {}),
    "ncsn++": (
        SongUNet,
        {
            "embedding": "fourier",
            "encoder": "residual",
            "filter_taps": (1, 3, 3, 1),
            "noise_mult": 2,
        },
    ),
    "ddpm": (DDPM, {}),
}


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The network called `name` with `overrides` of its fields; `dtype` may be a string.

    Raises:
        UserError: an unknown name or field.
    """
    if name not in NAMES:
        raise UserError(f"model: {name!r}{near(name, NAMES)} is none of {', '.join(NAMES)}")
    module, preset = NAMES[name]
    fields = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    for field in overrides:
        if field not in fields:
            raise UserError(f"model: {name} has no field {field!r}; it has {', '.join(fields)}")
    settings = {**preset, **overrides}
    if "dtype" in settings:
        settings["dtype"] = jnp.dtype(settings["dtype"])
    # Lists come from JSON and config files; a module's fields must be hashable.
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return module(**settings)


def init_params(
    model: nn.Module,
    key: Key[Array, ""],
    latent_shape: tuple[int, int, int],
    cond_example: Cond | None = None,
) -> dict:
    """Fresh float32 parameters for latents of `latent_shape` (h, w, c).

    `cond_example` carries the condition's shapes (any batch size) where they decide parameters: the
    channels of a spatial map, the width of tokens.
    """
    cond = None if cond_example is None else jax.tree.map(lambda a: a[:1], cond_example)
    x = jnp.zeros((1, *latent_shape), jnp.float32)
    t = jnp.zeros((1,), jnp.float32)
    return jax.jit(model.init)(key, x, t, cond)["params"]


def count_params(params: Any) -> int:
    """Number of scalars in a pytree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def forward_macs(
    model: nn.Module,
    latent_shape: tuple[int, int, int],
    in_channels: int = 0,
    tokens: tuple[int, int] = (0, 0),
) -> int:
    """Multiply-adds of one forward pass of one image of `latent_shape` (h, w, c).

    `in_channels` counts a concatenated spatial condition in, `tokens` (n, width) a context. A
    training step of one image is ``6 * forward_macs`` floating-point operations. A closed form for
    a DiT, for the others the products of the traced program, exactly.
    """
    h, w, c = latent_shape
    if getattr(model, "context_dim", 0) and not tokens[0]:
        tokens = (1, model.context_dim)  # one token: what a context costs is told by the caller
    if isinstance(model, DiT) and not tokens[0]:
        return dit.forward_macs(model, latent_shape, in_channels)
    spatial = jnp.zeros((1, h, w, in_channels - c)) if in_channels > c else None
    cond = Cond(spatial=spatial, tokens=jnp.zeros((1, *tokens)) if tokens[0] else None)
    x, t = jnp.zeros((1, h, w, c)), jnp.zeros((1,))
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, cond)
    return macs.traced_macs(lambda p: model.apply(p, x, t, cond), params)
