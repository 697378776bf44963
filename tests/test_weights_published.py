"""Every published network at its real size: names, shapes and the config that goes with the file.

The networks are built without memory (PyTorch's meta device); arrays of zeros without memory stand
in the file.
"""

import runpy

import numpy as np
import pytest
from checkout import ROOT

from lfm_jax.jobs import origin
from lfm_jax.models import NAMES, count_params, create_model, layers
from lfm_jax.weights import FAMILIES, bindings
from lfm_jax.weights.family import shapes_of
from lfm_jax.weights.files import TensorFile

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import torch_networks as theirs  # noqa: E402

pytestmark = pytest.mark.slow

L2, XL2 = (1024, 24, 16, 2), (1152, 28, 16, 2)


def guided(*arguments, **options):
    return theirs.GuidedUNet(256, *arguments, **{"heads": 4, "cin": 4, "cout": 4, **options})


OPENAI = {"cin": 3, "cout": 6, "inside": True, "head_channels": 64}


def google(size, widths, attended):
    kinds = ["AttnDownBlock2D" if i in attended else "DownBlock2D" for i in range(len(widths))]
    return diffusers.UNet2DModel(
        sample_size=size, block_out_channels=widths, layers_per_block=2, norm_eps=1e-6,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        down_block_types=kinds, up_block_types=[k.replace("Down", "Up") for k in kinds[::-1]],
    )  # fmt: skip


# what -> (family, network, config file and variant or None, classes, its millions)
PUBLISHED = {
    "celeb256_f8_adm": (
        "lfm-unet",
        lambda: guided((1, 2, 2, 2), 2, (8,)),
        ("celebahq", "adm"),
        0,
        153.1,
    ),
    "ffhq_f8_adm": (
        "lfm-adm",
        lambda: theirs.EdmUNet(32, 256, (1, 2, 3, 4), 2, (16, 8, 4), 4, 4),
        ("ffhq", "adm"),
        0,
        406.4,
    ),
    "bed_f8_adm": (
        "lfm-adm",
        lambda: theirs.EdmUNet(32, 256, (1, 2, 3, 4), 2, (16, 8, 4), 4, 4),
        ("lsun_bedroom", "adm"),
        0,
        406.4,
    ),
    "church_f8_adm": (
        "lfm-unet",
        lambda: guided((1, 2, 3, 4), 2, (8,)),
        ("lsun_church", "adm"),
        0,
        356.1,
    ),
    "imnet_f8_adm": (
        "lfm-adm",
        lambda: theirs.EdmUNet(32, 256, (1, 2, 3, 4), 2, (16, 8, 4), 4, 4, classes=1000),
        ("imagenet", "adm"),
        1000,
        407.4,
    ),
    "celeb512_f8_adm": (
        "lfm-unet",
        lambda: guided((1, 2, 2, 2, 4), 2, (8, 16)),
        ("celebahq", "512"),
        0,
        352.2,
    ),
    "celeb1024_f8_adm": (
        "lfm-adm",
        lambda: theirs.EdmUNet(128, 256, (1, 1, 2, 2, 4, 4), 2, (16, 8), 4, 4),
        ("celebahq", "1024"),
        0,
        531.8,
    ),
    "imnet_f8_ditb2": (
        "lfm-dit",
        lambda: theirs.DiT(768, 12, 12, 2, 4, 4, 32, 1001),
        ("imagenet", ""),
        1000,
        130.3,  # 130.5 with the position table, which is no parameter here
    ),
    **{
        f"{name}_f8_dit": (
            "lfm-dit",
            lambda: theirs.DiT(*L2, 4, 4, 32, 1),
            (config, ""),
            0,
            456.8,
        )
        for name, config in (
            ("celeb", "celebahq"),
            ("ffhq", "ffhq"),
            ("bed", "lsun_bedroom"),
            ("church", "lsun_church"),
        )
    },
    "facebook DiT-XL/2": (
        "dit",
        lambda: theirs.DiT(*XL2, 4, 8, 32, 1001),
        ("imagenet", "XL/2"),
        1000,
        674.8,
    ),
    "SiT-XL/2": (
        "sit",
        lambda: theirs.DiT(*XL2, 4, 8, 32, 1001),
        ("imagenet", "XL/2"),
        1000,
        674.8,
    ),
    "diffusers DiT-XL/2": (
        "diffusers-dit",
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
            num_layers=28, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        ),
        ("imagenet", "XL/2"),
        1000,
        674.8,
    ),
    "ADM 256": (
        "guided-diffusion",
        lambda: guided((1, 1, 2, 2, 4, 4), 2, (8, 16, 32), **OPENAI, classes=1000),
        None,
        1000,
        553.8,
    ),
    "ADM 512": (
        "guided-diffusion",
        lambda: guided((0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), **OPENAI, classes=1000),
        None,
        1000,
        559.0,  # the paper says 559
    ),
    "ADM 64": (
        "guided-diffusion-64",
        lambda: theirs.GuidedUNet(
            192, (1, 2, 3, 4), 3, (2, 4, 8), heads=0, **OPENAI, classes=1000
        ),
        None,
        1000,
        295.9,
    ),
    "DDPM CIFAR-10": (
        "diffusers-ddpm",
        lambda: google(32, (128, 256, 256, 256), (1,)),
        None,
        0,
        35.7,
    ),
    "DDPM 256": (
        "diffusers-ddpm",
        lambda: google(256, (128, 128, 256, 256, 512, 512), (4,)),
        None,
        0,
        113.7,
    ),
}  # fmt: skip


def hollow(network):
    """The file: shapes for all, values only where they are checked."""
    tensors = {}
    for name, value in network.state_dict().items():
        tensors[name] = np.broadcast_to(np.float32(0), tuple(value.shape))
        if name.endswith("resample_filter"):
            tensors[name] = np.full(tuple(value.shape), 0.25, np.float32)
        if name == "pos_embed":
            side = int(value.shape[1] ** 0.5)
            tensors[name] = layers.position_table(side, side, value.shape[2])[None]
    return TensorFile(path="file", tensors=tensors, sha256="", weights="raw")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_fits_its_config(name):
    family, make, config, classes, millions = PUBLISHED[name]
    with torch.device("meta"):
        network = make()
    file = FAMILIES[family].clean(hollow(network))
    found = FAMILIES[family].recognise(file)
    fields = found.overrides
    if config is not None:
        loaded = runpy.run_path(ROOT / f"configs/{config[0]}.py")["get_config"](config[1])
        assert NAMES[loaded.model.name][0] is NAMES[found.name][0]
        stated = {**NAMES[loaded.model.name][1], **origin.network_fields(loaded)}
        fields = {**fields, **stated}
        assert loaded.data.num_classes == classes
    assert fields.get("num_classes", 0) == classes
    model = create_model(found.name, **fields)
    shapes = shapes_of(model, found)
    bindings.check(file, FAMILIES[family].bindings(model, shapes, found.latent_shape[0]), shapes)
    assert count_params(shapes) / 1e6 == pytest.approx(millions, abs=0.051)
    if name.startswith("DDPM"):
        assert found.latent_shape[0] == {"DDPM CIFAR-10": 32, "DDPM 256": 256}[name]
