"""Fashion-MNIST in one, two or four steps: the flow of fashion_mnist.py, finetuned in minutes.

    python -m lfm_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python -m lfm_jax.main --config=configs/mmd_fashion_mnist.py --workdir=runs/mmd_fashion_mnist
    ... --config=configs/mmd_fashion_mnist.py:2 --workdir=...      two steps
    ... --config=configs/mmd_fashion_mnist.py:4 --workdir=...      four steps

Two CPU cores: three to four minutes of finetuning; the first run also trains three small feature
networks and one that judges (about two minutes each; --config.mmd.networks=FOLDER shares them).
What it reaches stands in docs/results/mmd.json. Sampling defaults to the same N, grid and guidance.
"""

from functools import partial

from ml_collections import ConfigDict

from lfm_jax.experiments import few_step, neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "fashion_mnist.py")
    few_step(config, init="runs/fashion_mnist", num_steps=1)
    config.train.steps = 1000  # as many as five minutes on two cores allow
    config.train.batch_size = 32  # many small updates went further than few large ones
    config.train.learning_rate = 5e-5
    config.train.warmup_steps = 40
    config.train.schedule = "cosine"
    config.train.ema_decay = 0.97
    config.train.log_every = 20
    config.train.save_every = 400
    config.mmd.validate_every = 250
    config.mmd.grid = "0.8,0"
    config.mmd.kernel = "energy"  # its pull does not fade with the distance: tails fill up
    config.mmd.joint = 64.0  # nor does that of other classes, unless they are this far apart
    config.mmd.groups = 8  # classes an update, four samples each: the rest of a batch is far away
    config.mmd.entries = ("features", "maps", "logits")
    config.mmd.network_seeds = (11, 12, 13)
    config.mmd.network_steps = 1600
    config.mmd.network_noise = 0.3
    config.mmd.baked = (1.05,)  # the base's best guidance makes its classes plainer than the data's
    config.evaluate.extractor = "classifier"
    return variants(
        config,
        variant,
        smoke=partial(smoke, synthetic=False, limit=512),
        **{"2": partial(_steps, count=2), "4": partial(_steps, count=4)},
    )


def _steps(config: ConfigDict, *, count: int) -> ConfigDict:
    config.mmd.num_steps = config.mmd.kept_steps = count
    config.train.steps, config.mmd.validate_every = {2: (710, 355), 4: (400, 200)}[count]
    config.mmd.validate_samples = 1000
    config.train.learning_rate = {2: 5e-5, 4: 4e-5}[count]
    config.mmd.grid = {2: "0.9,0.6,0", 4: "0.97,0.8,0.55,0.3,0"}[count]
    config.mmd.baked = ({2: 1.05, 4: 1.115}[count],)
    return config
