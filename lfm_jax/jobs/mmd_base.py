"""What a finetuning starts from: the base's weights, its autoencoder and judges, its latents."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lfm_jax import mmd
from lfm_jax.errors import UserError
from lfm_jax.jobs import origin
from lfm_jax.workdir import Workdir, on_main_process
from lfm_jax.writers import copy_whole


def base_workdir(config: ConfigDict) -> Workdir:
    """The workdir or release that ``config.init`` names.

    Raises:
        UserError: it is unset, or not a folder.
    """
    if config.init is None:
        raise UserError(
            "--config.init is unset: loss=mmd finetunes a trained flow; expected its workdir"
        )
    root = epath.Path(config.init)
    if not root.is_dir():
        raise UserError(f"--config.init={config.init}: no such folder; expected a trained workdir")
    return Workdir(root)


def base_params(config: ConfigDict) -> Any:
    """The base's averaged weights.

    Raises:
        UserError: there are none, or they are no plain network's.
    """
    base_workdir(config)
    params = origin.initial_params(config.init)
    if mmd.is_few_step(params):
        raise UserError(
            f"--config.init={config.init}: a few-step sampler with a grid or offset of its own; "
            "expected the plain network that it was made from"
        )
    return params


def take_along(base: Workdir, workdir: Workdir) -> None:
    """Copy what sampling and judging need of the base: its autoencoder and its judges.

    A copy, so that the finetuned workdir stands alone; the latent cache is only read.
    """

    def copy() -> None:
        for name in ("autoencoder", "extractors", "results/autoencode.json"):
            source, target = base.root / name, workdir.root / name
            if source.exists() and not target.exists():
                copy_whole(source, target)

    on_main_process(copy)


def latents(config: ConfigDict, workdir: Workdir) -> epath.Path:
    """The latent cache: this workdir's own, or the base's."""
    own = workdir.latents("train")
    return own if own.exists() else base_workdir(config).latents("train")
