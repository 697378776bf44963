"""MMD finetuning, which is the train job under ``config.loss = "mmd"``.

It starts from the weights of ``config.init``, takes that workdir's autoencoder along and reads its
latent cache. ``finetune/`` holds the running state, to go on from; ``checkpoints/`` the snapshot
that did best on validation features, which are neither trained on nor what figures are made with.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lfm_jax import checkpoints, mmd, rng, sharding
from lfm_jax.data import open_cache
from lfm_jax.errors import UserError
from lfm_jax.flow import draw_latents, flow_matching_loss, make_grid
from lfm_jax.jobs import build, mmd_bank, mmd_clock, mmd_features, origin
from lfm_jax.jobs.fit import fit
from lfm_jax.jobs.mmd_base import base_params, base_workdir, latents, take_along
from lfm_jax.jobs.mmd_cost import share_of_base, update_macs
from lfm_jax.jobs.mmd_monitor import Monitor, snapshot
from lfm_jax.jobs.previews import previews
from lfm_jax.models import init_params
from lfm_jax.state import TrainState, create_state, make_step
from lfm_jax.workdir import Workdir


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """What the train job's result depends on beside its own sections."""
    found = open_cache(latents(config, workdir))
    section = build.section(config, "mmd")["mmd"]
    section.pop("networks", None)  # left out where it is unset
    if config.mmd.decoder == "preview":  # what is free elsewhere decides here
        section["preview"] = config.autoencoder.preview
    return {
        "base": checkpoints.fingerprint(base_params(config)),
        "cache": found.fingerprint,
        "mmd": section,
    }


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section, options = config.train, config.mmd
    base = base_workdir(config)
    mesh = build.mesh(config)
    sharding.check_batch(mesh, "train.batch_size", section.batch_size // section.accumulate)
    params = base_params(config)
    for field in ("guidance", "teacher_guidance"):
        if options[field] != 1:
            needs = f"--config.mmd.{field}={options[field]:g}"
            origin.require_null_label(base.root, needs, "1 (off)")
    model, key = build.network(config), jax.random.key(config.seed)
    found = open_cache(latents(config, workdir), verify=False)
    if section.mirror and "moments_flip" not in found.features:
        raise UserError(
            f"--config.train.mirror=True: {found.folder} holds no mirror images; expected False, "
            "or a cache that was encoded with encode.mirror=True"
        )
    wanted = jax.eval_shape(lambda: init_params(model, key, found.latent_shape))
    origin.check_fits(config.init, params, wanted)
    mmd_features.check_names(options.features)
    times = _grid_times(config, model)
    layout = sharding.rules(config.mesh.rules)

    # ---- from here on the workdir is this run's
    take_along(base, workdir)
    codec = build.codec(config, workdir)
    cache = open_cache(latents(config, workdir), encoder=codec.fingerprint)

    # ---- what is compared, and with what
    maps, judge, parts = mmd_features.feature_maps(config, workdir, codec, cache, model, params)
    bank = mmd_bank.real_bank(config, workdir, codec, cache, maps, model, params)
    spaces = mmd_bank.feature_spaces(config, bank)
    steps = (options.num_steps, *options.more_steps)
    scales = tuple(options.baked) or (1.0,)
    tuned = mmd.trainable(
        options.trainable,
        params,
        key,
        rank=options.lora_rank,
        times=times,
        several_steps=len(steps) > 1,
        several_scales=len(scales) > 1,
    )
    mask = None if options.trainable == "all" else mmd.trained_mask(options.trainable, tuned)
    rows = functools.partial(
        mmd.row_generator,
        model,
        latent_shape=cache.latent_shape,
        num_classes=config.data.num_classes,
        solver=options.solver,
        grid=build.grid(options.grid, key="mmd.grid"),
        eta=options.eta,
        loop_guidance=options.guidance,
        scales=scales,
        kept=options.kept_steps,
    )
    latent_options = {"scale": codec.scale, "shift": codec.shift, "mirror": section.mirror}
    from_batch = functools.partial(_batch_rows, maps, latent_options, config.data.num_classes)
    anchor = None
    if options.anchor:
        matching = flow_matching_loss(
            model,
            num_classes=config.data.num_classes,
            label_drop=section.label_drop,
            time_sampling=section.time_sampling,
            **latent_options,
        )
        anchor = lambda p, batch, key: matching(mmd.deploy(p)[0], batch, key)  # noqa: E731
    loss = mmd.mmd_loss(
        rows(maps=maps, steps=steps, backprop=options.backprop_steps, mask=mask),
        spaces,
        bank=bank if options.real == "bank" else None,
        bank_rows=options.bank_rows,
        real=from_batch if options.real == "batch" else None,
        estimator=options.estimator,
        block=options.block,
        chunks=options.chunks,
        backward_chunks=options.backward_chunks,
        guidance=scales,
        anchor=anchor,
        anchor_weight=options.anchor,
        groups=options.groups,
    )

    # ---- the loop
    tx = build.optimizer(section)
    if mask is not None:
        names = jax.tree.map(lambda moves: "trained" if moves else "frozen", mask)
        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, names)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like, tuned)
    state = create_state(zeros, tx, mesh, ema=section.ema_decay > 0, rules=layout)
    state = origin.started_from(state, tuned)
    step = make_step(
        loss,
        tx,
        key,
        ema_decay=section.ema_decay,
        accumulate=section.accumulate,
        skip_nonfinite=section.nonfinite == "skip",
        like=state,
    )
    record = {
        "base": checkpoints.fingerprint(params),
        "cache": cache.fingerprint,
        "seed": config.seed,
        "global_batch": section.batch_size,
    }
    if options.decoder == "preview":
        record["decoder"] = config.autoencoder.preview
    monitor = Monitor(
        config=config,
        workdir=workdir,
        rows=[rows(maps=[judge.map], steps=(n,)) for n in steps],
        judge=judge,
        record=record,
    )
    clock = mmd_clock.start(workdir, record)

    def watch(state: TrainState, step: int) -> None:
        monitor(state, step)
        clock.keep()

    try:
        if options.validate_every:
            monitor(state, 0)
        state, figures = fit(
            "finetune",
            state,
            step,
            build.latents(cache, config, batch_size=section.batch_size),
            folder=workdir.root / "finetune",
            logs=workdir.logs,
            mesh=mesh,
            **build.loop(config),
            record=record,
            preview=(previews(config, workdir, deploy=snapshot) if section.preview_every else None),
            preview_every=section.preview_every,
            watch=watch if options.validate_every else None,
            watch_every=options.validate_every,
        )
        if not options.validate_every:
            monitor(state, section.steps, keep=True)
    finally:
        clock.keep()
    monitor.compare_with_base()
    chosen = checkpoints.load_params(workdir.checkpoints)
    return {
        **figures,
        # Compilation and validation included, and what the processes before this one took.
        "seconds_of_updates": clock.seconds(),
        "num_steps": options.num_steps,
        "more_steps": list(options.more_steps),
        "solver": options.solver,
        "snapshot_step": checkpoints.latest_step(workdir.checkpoints),
        "validation": monitor.history,
        "base_checkpoint": record["base"],
        "spaces": {name: int(space.mean.shape[0]) for name, space in spaces.items()},
        "feature_networks": parts,
        "trained_parameters": _trained(tuned, mask),
        "macs_an_update": update_macs(config, model, maps, cache.latent_shape),
        "share_of_base_flops": share_of_base(config, base, model, maps, cache.latent_shape),
        "checkpoint": checkpoints.fingerprint(chosen),
    }


def _trained(tuned: Any, mask: Any) -> int:
    leaves = jax.tree.leaves(tuned)
    moved = [True] * len(leaves) if mask is None else jax.tree.leaves(mask)
    return sum(leaf.size for leaf, moves in zip(leaves, moved, strict=True) if moves)


def _batch_rows(maps, latent_options, num_classes, batch, key):
    """The real side computed on the fly: the batch's own examples."""
    latents = draw_latents(batch, key, **latent_options)
    labels = None
    if num_classes:
        labels = jnp.where(batch["label"] < 0, num_classes, batch["label"])
    keys = rng.stream_keys(key, rng.Stream.POSTERIOR, batch["position"])
    return mmd.all_features(maps, latents, labels, keys), labels


def _grid_times(config: ConfigDict, model: Any) -> np.ndarray:
    """The falling times of the config's N steps."""
    options = config.mmd
    times = make_grid(
        build.grid(options.grid, key="mmd.grid"), options.num_steps, t_max=model.t_max
    )
    if len(times) != options.num_steps + 1:
        raise UserError(
            f"--config.mmd.grid={options.grid}: {len(times) - 1} steps; expected "
            f"mmd.num_steps={options.num_steps}"
        )
    return times
