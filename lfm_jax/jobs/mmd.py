"""MMD finetuning, which is the train job under ``config.loss = "mmd"``.

It starts from the weights of ``config.init``, takes that workdir's autoencoder along and reads its
latent cache. ``finetune/`` holds the running state, to go on from; ``checkpoints/`` the snapshot
that did best on validation features, which are neither trained on nor what figures are made with.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lfm_jax import checkpoints, mmd, rng, sharding
from lfm_jax.config import to_json
from lfm_jax.data import open_cache
from lfm_jax.errors import UserError
from lfm_jax.evaluate import FeatureStatistics, frechet_of
from lfm_jax.flow import draw_latents, flow_matching_loss
from lfm_jax.flow.solvers import get_solver
from lfm_jax.jobs import build, mmd_features, origin
from lfm_jax.jobs.fit import fit
from lfm_jax.models import forward_macs
from lfm_jax.state import TrainState, create_state, make_step
from lfm_jax.workdir import Workdir, on_main_process


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section, options = config.train, config.mmd
    base = base_workdir(config)
    mesh = build.mesh(config)
    sharding.check_batch(mesh, "train.batch_size", section.batch_size // section.accumulate)
    params = base_params(config)
    for key in ("guidance", "teacher_guidance"):
        if options[key] != 1:
            needs = f"--config.mmd.{key}={options[key]:g}"
            origin.require_null_label(base.root, needs, "1 (off)")
    model = build.network(config)
    take_along(base, workdir)
    codec = build.codec(config, workdir)
    cache = open_cache(latents(config, workdir), encoder=codec.fingerprint)
    check_network(config, model, params, cache.latent_shape)

    # ---- what is compared, and with what
    key = jax.random.key(config.seed)
    maps, judge, parts = mmd_features.feature_maps(config, workdir, codec, cache, model, params)
    bank = mmd_features.real_bank(config, workdir, codec, cache, maps, model, params)
    spaces = mmd_features.feature_spaces(config, bank)
    steps = (options.num_steps, *options.more_steps)
    scales = tuple(options.baked) or (1.0,)
    tuned = mmd.trainable(
        options.trainable,
        params,
        key,
        rank=options.lora_rank,
        times=mmd_features.grid_times(config, model),
        steered=len(steps) > 1 or len(scales) > 1,
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
        self_normalise=options.self_normalise,
        anchor=anchor,
        anchor_weight=options.anchor,
        groups=options.groups,
    )

    # ---- the loop
    tx = build.optimizer(section)
    if mask is not None:
        names = jax.tree.map(lambda moves: "trained" if moves else "frozen", mask)
        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, names)
    state = _initial(tuned, tx, mesh, ema=section.ema_decay > 0)
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
    monitor = Monitor(
        config=config,
        workdir=workdir,
        rows=[rows(maps=[judge.map], steps=(n,)) for n in steps],
        judge=judge,
        record=record,
    )
    begin = time.perf_counter()
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
        steps=section.steps,
        batch_size=section.batch_size,
        record=record,
        config=to_json(config),
        log_every=section.log_every,
        save_every=section.save_every,
        keep=section.keep,
        skip_nonfinite=section.nonfinite == "skip",
        watch=monitor if options.validate_every else None,
        watch_every=options.validate_every,
    )
    if not options.validate_every:
        monitor(state, section.steps, keep=True)
    chosen = checkpoints.load_params(workdir.checkpoints)
    return {
        **figures,
        "seconds_of_updates": time.perf_counter() - begin,  # compilation and validation included
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
        "share_of_base_flops": _share(config, base, model, maps, cache.latent_shape),
        "checkpoint": checkpoints.fingerprint(chosen),
    }


# ---- the base


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


def check_network(config: ConfigDict, model: Any, params: Any, latent_shape: tuple) -> None:
    """Raises a `UserError` unless `params` are those of the config's network."""
    x, t = jnp.zeros((1, *latent_shape)), jnp.zeros((1,))
    wanted = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
         for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, wanted)
    ]  # fmt: skip
    for name in sorted({*shapes[0], *shapes[1]}):
        found, expected = (part.get(name) for part in shapes)
        if found != expected:
            raise UserError(
                f"--config.init={config.init}: another architecture: {name} has shape {found}; "
                f"--config.model of {config.model.name} expects {expected}"
            )


def take_along(base: Workdir, workdir: Workdir) -> None:
    """Copy what sampling and judging need of the base: its autoencoder and its judges.

    A copy, so that the finetuned workdir stands alone; the latent cache is only read.
    """

    def copy() -> None:
        for name in ("autoencoder", "extractors", "results/autoencode.json"):
            source, target = base.root / name, workdir.root / name
            if source.exists() and not target.exists():
                # Under another name until it is whole: what a kill leaves must not look done.
                partial = target.parent / f".{target.name}.partial"
                if partial.exists():
                    partial.rmtree() if partial.is_dir() else partial.unlink()
                _copy(source, partial)
                partial.rename(target)

    on_main_process(copy)


def _copy(source: epath.Path, target: epath.Path) -> None:
    if not source.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.copy(target)
        return
    for child in source.iterdir():
        _copy(child, target / child.name)


def latents(config: ConfigDict, workdir: Workdir) -> epath.Path:
    """The latent cache: this workdir's own, or the base's."""
    own = workdir.latents("train")
    return own if own.exists() else base_workdir(config).latents("train")


# ---- the state


def _initial(tuned: Any, tx: Any, mesh: Any, *, ema: bool) -> TrainState:
    """A fresh state of these parameters, each in its place."""
    state = create_state(lambda: jax.tree.map(jnp.zeros_like, tuned), tx, mesh, ema=ema)
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), tuned, state.params)
    average = None if state.ema is None else jax.tree.map(lambda x: x.copy(), placed)
    return state.replace(params=placed, ema=average)


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


# ---- watching


class Monitor:
    """Scores the averaged weights on validation features and keeps the best snapshot.

    Called as ``monitor(state, step)``; the noises are the same every time. The score is the Frechet
    distance of the judge's features to real ones, averaged over the numbers of steps in the
    logarithm. A spread of the samples below ``config.mmd.collapse`` times the real one ends it.
    """

    def __init__(
        self, *, config: ConfigDict, workdir: Workdir, rows: list, judge: Any, record: dict
    ):
        self.config, self.workdir, self.record = config, workdir, record
        self.judge = judge
        self.history: list[dict[str, float]] = self._earlier()
        batch = 250
        count = -(-config.mmd.validate_samples // batch) * batch
        self._parts = [
            {
                "position": jnp.arange(start, start + batch, dtype=jnp.uint32),
                "label": jnp.asarray(judge.labels[start : start + batch]),
                "draws": jnp.zeros((batch, 2)),
            }
            for start in range(0, count, batch)
        ]
        key = jax.random.key(config.seed + 1)
        self._rows = [
            jax.jit(lambda params, part, r=r: next(iter(r(params, part, key)[0].values())))
            for r in rows
        ]

    def __call__(self, state: TrainState, step: int, *, keep: bool = False) -> None:
        if any(entry["step"] == step for entry in self.history):
            return
        params = state.best_params
        scores, spreads = [], []
        for rows in self._rows:
            features = np.concatenate([np.asarray(rows(params, part)) for part in self._parts])
            if not np.isfinite(features).all():
                raise FloatingPointError(f"finetune: samples are not finite at step {step}")
            scores.append(frechet_of(FeatureStatistics.of(features), self.judge.statistics))
            centred = features - features.mean(0)
            spreads.append(np.sqrt(np.square(centred).sum(1).mean()) / self.judge.spread)
        entry = {
            "step": step,
            "score": float(np.exp(np.mean(np.log(np.maximum(scores, 1e-9))))),
            "spread": float(min(spreads)),
        }
        best = min((e["score"] for e in self.history if e["step"]), default=np.inf)
        self.history.append(entry)
        logging.info("finetune: step %d, validation %.4f", step, entry["score"])
        if entry["spread"] < self.config.mmd.collapse:
            raise FloatingPointError(
                f"finetune: collapse at step {step}: samples spread {entry['spread']:.2f} times "
                f"as far as real ones, below --config.mmd.collapse={self.config.mmd.collapse:g}; "
                f"the snapshot of step {checkpoints.latest_step(self.workdir.checkpoints)} is kept"
            )
        # Step 0 is the base itself: a score to beat, not a snapshot.
        if keep or (step and entry["score"] <= best):
            self._save(params, step)

    def _save(self, params: Any, step: int) -> None:
        snapshot = TrainState(step=jnp.int32(step), params=_final(params), opt_state=(), ema=None)
        with checkpoints.open_manager(self.workdir.checkpoints, keep=1) as manager:
            data = {"record": self.record, "validation": self.history}
            checkpoints.save(
                manager, step, snapshot, data=data, config=to_json(self.config), force=True
            )

    def _earlier(self) -> list[dict[str, float]]:
        """What an interrupted run had measured up to its snapshot."""
        if checkpoints.latest_step(self.workdir.checkpoints) is None:
            return []
        with checkpoints.open_manager(self.workdir.checkpoints, keep=1) as manager:
            saved = checkpoints.read_json(manager, checkpoints.DATA)
        return saved["validation"] if saved["record"] == self.record else []


def _final(params: Any) -> Any:
    """What a snapshot holds: low-rank updates merged, a trained grid or offset beside."""
    extra = dict(params.get(mmd.FEW_STEP, {}))
    if "lora" not in extra:
        return params
    plain, _ = mmd.deploy({**params, mmd.FEW_STEP: {"lora": extra.pop("lora")}})
    return {**plain, mmd.FEW_STEP: extra} if extra else plain


# ---- cost


def update_macs(config: ConfigDict, model: Any, maps: list, latent_shape: tuple) -> int:
    """Multiply-adds of one update by the closed form.

    A differentiated step costs four forward passes (forward, again, and twice backward; the last
    Euler step three), a step before a truncation one, gradcache one more; a feature network two
    (forward, and backward to its input). Validation: one of all of them a sample.
    """
    options = config.mmd
    solver = "euler" if options.solver == "ddim" else options.solver
    steps = (options.num_steps, *options.more_steps)
    evaluations = get_solver(solver).evaluations
    passes = []
    for count in steps:
        through = min(options.backprop_steps or count, count)
        kept = options.solver == "euler"  # the last step is not run again
        again = (options.chunks > 1) * count
        passes.append(evaluations * (count - through + 4 * through + again) - kept)
    guided = 2 if options.guidance != 1 else 1
    network = guided * float(np.mean(passes)) * forward_macs(model, latent_shape)
    if options.anchor:
        network += 3 * forward_macs(model, latent_shape)
    features = mmd_features.feature_macs(maps, latent_shape, config.data.num_classes)
    return int(config.train.batch_size * (network + 2 * features))


def _share(config, base, model, maps, latent_shape) -> float | None:
    """Multiply-adds of updates and validation over the base training's, where that is known."""
    trained = base.result("train")
    if trained is None or "examples_drawn" not in trained:
        return None
    whole = 3 * forward_macs(model, latent_shape) * trained["examples_drawn"]
    updates = config.train.steps * update_macs(config, model, maps, latent_shape)
    options, validation = config.mmd, 0
    if options.validate_every:
        network = sum((options.num_steps, *options.more_steps)) * forward_macs(model, latent_shape)
        features = mmd_features.feature_macs(maps[:1], latent_shape, config.data.num_classes)
        rounds = config.train.steps // options.validate_every + 1
        validation = rounds * options.validate_samples * (network + features)
    return (updates + validation) / whole


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """What the train job's result depends on beside its own sections."""
    found = open_cache(latents(config, workdir))
    section = build.section(config, "mmd")["mmd"]
    section.pop("networks", None)  # left out where it is unset
    return {
        "base": checkpoints.fingerprint(base_params(config)),
        "cache": found.fingerprint,
        "mmd": section,
    }
