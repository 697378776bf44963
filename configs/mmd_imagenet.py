r"""ImageNet 256x256 in four steps: a class-conditional DiT, trained here or imported, finetuned.

    python -m lfm_jax.main --config=configs/mmd_imagenet.py --workdir=runs/mmd_imagenet \
        --config.init=runs/imagenet
    ... --config=configs/mmd_imagenet.py:tokens    no decoder: the backbone's own tokens

Global batches of 2,048 in 16 chunks (the gradient is the whole batch's), 64 classes an update,
a Gaussian (not the paper's cubic kernel) on CLIP's features through the full decoder, compared
within classes. Hardware: one GPU or a pod slice. Expected time, from the closed FLOP form at 40 %
MFU on one H200: `:tokens` 500 updates about 0.7 h; through the decoder about 2 h. Expected figure:
none is known for this experiment; the original's finetuning of pixel models (Aiello et al. 2023)
reports FIDs for CIFAR-10, CelebA, ImageNet-64 and LSUN-Church.
"""

from ml_collections import ConfigDict

from lfm_jax.experiments import few_step, neighbour, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "imagenet.py")
    few_step(config, init="runs/imagenet", num_steps=4)
    config.train.steps = 500
    config.train.batch_size = 2048
    config.train.learning_rate = 1e-5
    config.train.warmup_steps = 50
    config.train.ema_decay = 0.99
    config.train.log_every = 10
    config.train.save_every = 50
    config.mmd.features = ("clip",)
    config.mmd.groups = 64
    config.mmd.chunks = 16
    config.mmd.bank_size = 200_000
    config.mmd.bank_rows = 8192
    config.mmd.validate_samples = 2000
    config.mmd.validate_every = 50
    config.sample.num_samples = 50_000
    return variants(config, variant, tokens=_tokens)


def _tokens(config: ConfigDict) -> ConfigDict:
    config.mmd.features = ("tokens",)
    config.mmd.target = "latents"
    return config
