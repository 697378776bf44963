"""What a family of published weights is: how to recognise its networks and name its tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.models import Cond, create_model
from lfm_jax.weights.bindings import Binding
from lfm_jax.weights.files import TensorFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network recognised in a file: what `create_model` takes, and the shapes it runs on.

    Attributes:
        name, overrides: `create_model(name, **overrides)` is the network.
        latent_shape: (h, w, c) it was made for, as far as the file tells.
        spatial_channels: of a concatenated condition map.
    """

    name: str
    overrides: dict[str, Any]
    latent_shape: tuple[int, int, int]
    spatial_channels: int = 0

    def model(self) -> nn.Module:
        return create_model(self.name, **self.overrides)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of file.

    Attributes:
        clean: drops what is no parameter here (fixed tables, buffers, a learned sigma), after
            checking it.
        recognise: the network of a cleaned file.
        module: the class of its networks; the `model` of the functions below is one.
        bindings: of a network whose parameters have the given shapes, on latents of a given side:
            ``(model, shapes, side) -> bindings``.
        extra: what files of this family hold beside the tensors of parameters (fixed tables,
            buffers, copies): ``(model, tensors, side) -> tensors`` for latents of `side`.
        export: checks that a network can be told in this family's terms and returns its
            parameters in them.
        prefix: of each tensor's name in a file written for the family's own loader.
        null_label: whether its class-conditional networks know a null label.
    """

    clean: Callable[[TensorFile], TensorFile]
    recognise: Callable[[TensorFile], Network]
    module: type[nn.Module]
    bindings: Callable[[Any, Any, int], list[Binding]]
    extra: Callable[[Any, dict, int], dict[str, np.ndarray]] = lambda model, tensors, side: {}
    export: Callable[[Any, dict], dict] = lambda model, params: params
    prefix: str = ""
    null_label: bool = True


def shapes_of(model: nn.Module, network: Network) -> Any:
    """Shapes of the parameters that `model` has on the latents of `network`."""
    h, w, c = network.latent_shape
    # Shapes alone: sides and channels are the file's claims.
    x, t = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, h, w, c), (1,)))
    spatial = None
    if network.spatial_channels:
        spatial = jax.ShapeDtypeStruct((1, h, w, network.spatial_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x, t, Cond(spatial=spatial))["params"]


def without(file: TensorFile, drop: Callable[[str], bool]) -> TensorFile:
    """The file less the tensors whose names `drop` picks."""
    kept = {name: value for name, value in file.tensors.items() if not drop(name)}
    return dataclasses.replace(file, tensors=kept)


def renamed(file: TensorFile, rename: Callable[[str], str]) -> TensorFile:
    """The file with every tensor under the name that `rename` gives it."""
    tensors = {rename(name): value for name, value in file.tensors.items()}
    return dataclasses.replace(file, tensors=tensors)


def replaced(file: TensorFile, tensors: dict[str, np.ndarray]) -> TensorFile:
    """The file with some tensors put in the place of others."""
    return dataclasses.replace(file, tensors={**file.tensors, **tensors})
