"""Published weights in and out: `load_torch`, `save_torch`, and `import_torch` for the whole story.

    imported = import_torch("lfm-dit", "model_475.pth")
    model, params = imported.model(), imported.params
    save_torch("lfm-dit", params, "mine.pth", model=model)

A converted network is an ordinary one: time direction, noise prediction and time scale are fields
of the model (`lfm_jax.models.conventions`), so that sampling, training, MMD and editing need no
special case, except that sampling starts at ``model.t_max``.
"""

import dataclasses
import os
from typing import Any

import flax.linen as nn

from lfm_jax.errors import UserError, blaming
from lfm_jax.models import NAMES, create_model
from lfm_jax.weights import adm, ddpm, dit, unet
from lfm_jax.weights.bindings import to_params, to_tensors
from lfm_jax.weights.family import Family, shapes_of
from lfm_jax.weights.files import read_tensors, write_tensors

FAMILIES: dict[str, Family] = {**dit.FAMILIES, **adm.FAMILIES, **unet.FAMILIES, **ddpm.FAMILIES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """A network from a file.

    Attributes:
        name, overrides: ``create_model(name, **overrides)`` is the network; JSON-able.
        params: its parameters, float32 numpy.
        latent_shape: (h, w, c) it was made for, as far as the file tells (else the smallest that
            it runs on).
        spatial_channels: channels of the condition map that it takes.
        sha256: of the file.
        weights: ``ema`` or ``raw``, whichever was taken.
        t_max: where sampling starts.
        null_label: whether its label table, if any, has a null label that was trained: what
            classifier-free guidance needs.
    """

    name: str
    overrides: dict[str, Any]
    params: dict
    latent_shape: tuple[int, int, int]
    spatial_channels: int
    sha256: str
    weights: str
    t_max: float
    null_label: bool = True

    def model(self) -> nn.Module:
        return create_model(self.name, **self.overrides)


def import_torch(
    family: str,
    file: str | os.PathLike,
    *,
    weights: str = "auto",
    sha256: str = "",
    model: nn.Module | None = None,
    name: str = "",
    **overrides: Any,
) -> Imported:
    """Recognise the network in a file of `family` and read its parameters.

    Args:
        family: a name of `FAMILIES`.
        file: path or URL; downloads are kept in the user's cache.
        weights: ``ema``, ``raw`` or ``auto`` (EMA where the file has it).
        sha256: checksum (hex) that the file must have; empty: not checked.
        model: the network to be filled, where it is at hand: a file of another size is refused.
        name: of the network that the file must hold, e.g. "DiT-L/2"; empty: whatever it holds.
        overrides: fields that the network must have: ``heads`` of an unpublished size, which a file
            does not tell, or a size, which it does.

    Raises:
        UserError: naming the first tensor that is missing, too many or of another shape; a pickle
            with code in it; an unknown family; another checksum.
    """
    chosen = _family(family)
    content = read_tensors(file, weights=weights, sha256=sha256)
    with blaming(str(file), f"a file of the family {family!r}"):
        content = chosen.clean(content)
        found = chosen.recognise(content)
        kind = NAMES[found.name][0]
        preset = NAMES[name][1] if name in NAMES else {}
        network = dataclasses.replace(found, overrides={**found.overrides, **preset, **overrides})
        wanted = create_model(name) if name and model is None else model
        if wanted is not None and not isinstance(wanted, kind):
            raise UserError(
                f"{file}: a {family} file holds a network of the kind {found.name!r} "
                f"({kind.__name__}), the model is a {type(wanted).__name__}"
            )
        filled = network.model() if model is None else model
        shapes = shapes_of(filled, network)
        bindings = chosen.bindings(filled, shapes, network.latent_shape[0])
        return Imported(
            name=network.name,
            overrides=network.overrides,
            params=to_params(content, bindings, shapes),
            latent_shape=network.latent_shape,
            spatial_channels=network.spatial_channels,
            sha256=content.sha256,
            weights=content.weights,
            t_max=filled.t_max,
            null_label=chosen.null_label,
        )


def load_torch(
    family: str,
    file: str | os.PathLike,
    *,
    weights: str = "auto",
    sha256: str = "",
    model: nn.Module | None = None,
) -> dict:
    """The parameters in a file of `family`; `import_torch` tells what the network is, too."""
    return import_torch(family, file, weights=weights, sha256=sha256, model=model).params


def save_torch(
    family: str,
    params: dict,
    file: str | os.PathLike,
    *,
    model: nn.Module,
    latent_size: int = 32,
    prefix: str | None = None,
) -> None:
    """Write parameters as a file that the family's own code loads.

    Args:
        file: ``.safetensors``, or PyTorch's format under any other suffix.
        model: the network of the parameters.
        latent_size: side of the latents; fixed tables and, for "lfm-adm", names depend on it.
        prefix: of every name; default is what the family's own loader expects ("module." for
            LFM's, which cuts seven characters off whatever they are).

    Raises:
        UserError: a network that this family's code cannot express.
    """
    chosen = _family(family)
    params = exported(family, params, model=model)
    tensors = to_tensors(params, chosen.bindings(model, params, latent_size))
    tensors |= chosen.extra(model, tensors, latent_size)
    prefix = chosen.prefix if prefix is None else prefix
    write_tensors({prefix + name: value for name, value in tensors.items()}, file)


def exported(family: str, params: dict, *, model: nn.Module) -> dict:
    """Parameters of `model` in the terms of a family; `UserError` if it has none for them."""
    chosen = _family(family)
    if not isinstance(model, chosen.module):
        raise UserError(
            f"family: a {family} file holds a {chosen.module.__name__}, "
            f"the model is a {type(model).__name__}"
        )
    return chosen.export(model, params)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise UserError(f"family: {name!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[name]
