"""Train the velocity network on the latent cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.conditions import init_conditioned, input_sizes, training_condition, widen
from lfm_jax.data import open_cache
from lfm_jax.errors import UserError
from lfm_jax.flow import flow_matching_loss
from lfm_jax.jobs import build, mmd, mmd_base, origin, watch
from lfm_jax.jobs import condition as conditions
from lfm_jax.jobs.fit import fit
from lfm_jax.jobs.previews import previews
from lfm_jax.models import count_params, forward_macs, init_params
from lfm_jax.state import Loss, Params, TrainState, create_state, make_step
from lfm_jax.vae import Codec
from lfm_jax.workdir import FREE_TRAIN, Workdir


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    finetuned = mmd.inputs(config, workdir) if config.loss == "mmd" else {}
    cache = open_cache(mmd_base.latents(config, workdir) if finetuned else workdir.latents("train"))
    sections = build.section(config, "seed", "loss", "init", "model", "train")
    for key in FREE_TRAIN:
        del sections["train"][key]
    if config.condition.kind != "none":
        sections |= build.section(config, "condition")
    return {"cache": cache.fingerprint, **sections, **finetuned}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    if config.loss == "mmd":
        return mmd.run(config, workdir)
    section = config.train
    mesh = build.mesh(config)
    sharding.check_batch(mesh, "train.batch_size", section.batch_size // section.accumulate)

    # ---- data
    codec = build.codec(config, workdir)
    cache = open_cache(workdir.latents("train"), encoder=codec.fingerprint)
    latent_shape = cache.latent_shape
    if cache.num_classes_seen > config.data.num_classes > 0:
        raise UserError(
            f"--config.data.num_classes={config.data.num_classes}: the cache holds label "
            f"{cache.num_classes_seen - 1}"
        )

    # ---- network, objective, state
    key = jax.random.key(config.seed)
    tx = build.optimizer(section)
    init, loss, flops = objective(config, codec, latent_shape)
    state = create_state(
        init, tx, mesh, ema=section.ema_decay > 0, rules=sharding.rules(config.mesh.rules)
    )
    record = {
        "cache": cache.fingerprint,
        "seed": config.seed,
        "global_batch": section.batch_size,
    }
    if config.init is not None:
        state, record["init"] = _start_from(config, state)
    step = make_step(
        loss,
        tx,
        key,
        ema_decay=section.ema_decay,
        accumulate=section.accumulate,
        skip_nonfinite=section.nonfinite == "skip",
        like=state,
    )

    # ---- the loop
    state, figures = fit(
        "train",
        state,
        step,
        build.latents(cache, config, batch_size=section.batch_size),
        folder=workdir.checkpoints,
        logs=workdir.logs,
        mesh=mesh,
        **build.loop(config),
        record=record,
        train_flops=flops,
        preview=previews(config, workdir) if section.preview_every else None,
        preview_every=section.preview_every,
        watch=watch.watcher(config, workdir) if section.evaluate_every else None,
        watch_every=section.evaluate_every,
    )
    # What the last checkpoint holds, without every process reading it back.
    params = state.best_params
    return {
        **figures,
        **watch.summary(workdir),
        "parameters": count_params(params),
        "examples_drawn": section.steps * section.batch_size,
        "checkpoint": checkpoints.fingerprint(params),
    }


def objective(
    config: ConfigDict, codec: Codec, latent_shape: tuple[int, int, int]
) -> tuple[Callable[[], Params], Loss, float]:
    """How the network's parameters begin, its loss, and FLOPs of an example's update.

    Of the codec only scale, shift and sizes are read.
    """
    section = config.train
    key = jax.random.key(config.seed)
    model = build.network(config)
    condition = conditions.make(config, codec)
    given, init, macs = None, partial(init_params, model, key, latent_shape), {}
    if condition is not None:
        given = training_condition(
            condition, num_classes=config.data.num_classes, label_drop=section.label_drop
        )
        init = partial(init_conditioned, condition, model, key, latent_shape)
        macs = input_sizes(condition, latent_shape)
    loss = flow_matching_loss(
        model,
        scale=codec.scale,
        shift=codec.shift,
        num_classes=config.data.num_classes,
        label_drop=section.label_drop,
        mirror=section.mirror,
        time_sampling=section.time_sampling,
        condition=given,
    )
    return init, loss, 6.0 * forward_macs(model, latent_shape, **macs)


def _start_from(config: ConfigDict, state: TrainState) -> tuple[TrainState, str]:
    """The state with the weights of the workdir or release `config.init`, and their fingerprint."""
    init = config.init
    params = origin.initial_params(init)
    fingerprint = checkpoints.fingerprint(params)
    if config.condition.kind != "none":
        # The network's own patch: that of a named size stands in no field of the config.
        patch = getattr(build.network(config), "patch", 1)
        params = widen(params, sharding.fetch(state.params), patch=patch)
    origin.check_fits(init, params, state.params)
    return origin.started_from(state, params), fingerprint
