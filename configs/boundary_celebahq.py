r"""Semantic boundaries on CelebA-HQ 256x256: one of the 40 attributes, without training.

    python -m lfm_jax.main --config=configs/celebahq.py --workdir=runs/celebahq ...
    python -m lfm_jax.main --config=configs/boundary_celebahq.py --workdir=runs/smiling \
        --config.data.path=FOLDER --config.edit.table=CelebAMask-HQ-attribute-anno.txt

FOLDER has the images as files, in subfolders train and test. The table is CelebA's own layout or a
CSV with a header. LFM's published network does as well: `--job=convert` it into runs/celebahq (for
its U-Net use `:adm` here too). `:text` takes sides from CLIP in place of a table
(`--config.edit.clip=FOLDER`).

Hardware: one GPU. Expected time, from about 300 network evaluations for each of 2,500 images: a few
minutes on one H200. Expected figure: none is published for flows, and it is not measured here.
"""

from ml_collections import ConfigDict

from lfm_jax.experiments import lfm_network, neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "celebahq.py")
    config.job = "edit"
    config.init = "runs/celebahq"
    config.data.source = "folder"  # the table names files
    config.edit.attribute = "table:Smiling"
    config.edit.leakage = ("table:Male", "table:Young", "table:Eyeglasses")
    config.edit.num_fit = 2000
    config.edit.times = (0.5, 0.6, 0.7, 0.8, 0.87, 0.95)
    config.edit.batch_size = 32
    return variants(config, variant, adm=_adm, text=_text, smoke=_smoke)


def _adm(config: ConfigDict) -> ConfigDict:
    return lfm_network(config, "unet", (1, 2, 2, 2), (16, 8))


def _text(config: ConfigDict) -> ConfigDict:
    config.edit.attribute = "text:a photo of a serious face/a photo of a smiling face"
    config.edit.leakage = ()
    return config


def _smoke(config: ConfigDict) -> ConfigDict:
    smoke(config)
    config.edit.attribute = "pixels:brightness"  # synthetic images have no table
    config.edit.leakage = ()
    return config
