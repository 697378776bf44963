r"""CelebA-HQ 256x256 in four steps: an unconditional flow, trained here or imported, finetuned.

    python -m lfm_jax.main --config=configs/mmd_celebahq.py --workdir=runs/mmd_celebahq \
        --config.init=runs/celebahq --config.data.path=FOLDER
    ... --config=configs/mmd_celebahq.py:dinov2    DINOv2 in place of CLIP

Batches of 512 in 16 chunks against the features of 20,000 of the 27,000 images, half of them
mirrored. Hardware: one GPU. Expected time, from the closed FLOP form at 40 % MFU on one H200: 500
updates about 1 h, a good third of it in the decoder.
Expected figure: none is known for this experiment.
"""

from ml_collections import ConfigDict

from lfm_jax.experiments import few_step, neighbour, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "celebahq.py")
    few_step(config, init="runs/celebahq", num_steps=4)
    config.train.steps = 500
    config.train.batch_size = 512
    config.train.learning_rate = 1e-5
    config.train.warmup_steps = 50
    config.train.ema_decay = 0.99
    config.train.log_every = 10
    config.train.save_every = 50
    config.mmd.features = ("clip",)
    config.mmd.chunks = 16
    config.mmd.bank_size = 20_000
    config.mmd.bank_rows = 4096
    config.mmd.validate_samples = 1000
    config.mmd.validate_every = 50
    return variants(config, variant, dinov2=_dinov2)


def _dinov2(config: ConfigDict) -> ConfigDict:
    config.mmd.features = ("dinov2",)
    return config
