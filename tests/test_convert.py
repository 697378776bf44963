"""Other projects' weights through the jobs: convert, sample, train on, start anew from them.

The files have the exact names and layouts of each project, at small sizes and random values; no
config field tells what they are.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lfm_jax import checkpoints, jobs, rng, vae, weights
from lfm_jax.config import default_config
from lfm_jax.errors import UserError
from lfm_jax.flow import NetworkVelocity, sample
from lfm_jax.jobs import build, editing, origin
from lfm_jax.jobs import sample as sample_job
from lfm_jax.models import Cond
from lfm_jax.workdir import Workdir, claim

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import torch_networks as theirs  # noqa: E402

LATENTS = (16, 3)  # image side; latents 8x8x4
PIXELS = (8, 3)
PIXELS32 = (32, 3)


def diffusers_unet():
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, norm_eps=1e-6,
        block_out_channels=(32, 64), downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None,
    )  # fmt: skip


def diffusers_dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    )  # fmt: skip


def old_names(state):
    """As google/ddpm-* have them: attention before diffusers renamed it."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        if "attentions" in name:
            for new, old in names.items():
                name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    return renamed


def ddim_names(state, folder):
    """DDIM's own names, through the network that diffusers' names give."""
    torch.save(state, folder / "diffusers.pt")
    found = weights.import_torch("diffusers-ddpm", folder / "diffusers.pt")
    weights.save_torch("ddpm", found.params, folder / "ddim.ckpt", model=found.model())
    return torch.load(folder / "ddim.ckpt", weights_only=True)


def prefixed(state, _):
    return {f"module.{name}": value for name, value in state.items()}


def plain(state, _):
    return state


# family -> (network, layout of the file, images, classes, network here, t_max)
CASES = {
    "lfm-dit": (lambda: theirs.DiT(64, 1, 1, 2, 4, 4, 8, 1), prefixed, LATENTS, 0, "DiT", 1.0),
    "lfm-adm": (
        lambda: theirs.EdmUNet(8, 64, (1, 2), 1, (4,), 4, 4, classes=10),
        plain,
        LATENTS,
        10,
        "adm",
        1.0,
    ),
    "lfm-unet": (
        lambda: theirs.GuidedUNet(32, (1, 2), 1, (2,), 4, 4, 4),
        prefixed,
        LATENTS,
        0,
        "unet",
        1.0,
    ),
    "dit": (lambda: theirs.DiT(64, 1, 1, 2, 4, 8, 8, 11), plain, LATENTS, 10, "DiT", 0.9937),
    "sit": (
        lambda: theirs.DiT(64, 1, 1, 2, 4, 8, 8, 11),
        lambda state, _: {"model": state, "ema": state, "opt": {}, "args": None},
        LATENTS,
        10,
        "DiT",
        1.0,
    ),
    "diffusers-dit": (diffusers_dit, plain, LATENTS, 10, "DiT", 0.9937),
    "guided-diffusion": (
        lambda: theirs.GuidedUNet(
            64, (1, 2), 1, (2,), 4, 3, 6, classes=10, inside=True, head_channels=64
        ),
        plain,
        PIXELS,
        10,
        "unet",
        0.9937,
    ),
    "ddpm": (diffusers_unet, ddim_names, PIXELS32, 0, "ddpm", 0.9937),
    "diffusers-ddpm": (
        diffusers_unet,
        lambda s, _: old_names(s),
        PIXELS32,
        0,
        "ddpm",
        0.9937,
    ),
}


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """A folder with an autoencoder of factor 2 and 4 channels, as diffusers has them."""
    folder = tmp_path_factory.mktemp("vae")
    model = vae.AutoencoderKL(
        block_out_channels=(8, 8), norm_groups=4, layers_per_block=1, mid_attention=False
    )
    return vae.save_vae(folder, model, vae.init_vae(model, jax.random.key(0)))


def write(family, folder):
    network, layout = CASES[family][:2]
    made = theirs.randomise(network())
    torch.save(layout(made.state_dict(), folder), folder / "weights.pth")
    return folder / "weights.pth"


def config_of(family, folder, file):
    _, _, (side, channels), classes, name, _ = CASES[family]
    config = default_config()
    config.data.source = "synthetic"
    config.data.image_size, config.data.channels = side, channels
    config.data.num_classes, config.data.limit = classes, 8
    if (side, channels) == LATENTS:
        config.autoencoder.kind = "pretrained"
        config.autoencoder.weights = str(folder)
    else:
        config.autoencoder.kind = "identity"
    config.model.name = name
    config.convert.family, config.convert.file = family, str(file)
    config.train.steps = config.train.log_every = 1
    config.train.batch_size = 4
    config.train.save_every = 1
    config.sample.num_samples = config.sample.batch_size = 2
    config.sample.num_steps = 2
    config.sample.latents = True
    return config


def expected_latents(family, file, config):
    """What the imported network gives without any job: two Euler steps from `t_max`."""
    found = weights.import_torch(family, file)
    model = found.model()
    codec = build.codec(config, Workdir(epath.Path("/nowhere")))
    keys = rng.stream_keys(jax.random.key(0), rng.Stream.SAMPLE, jnp.arange(2, dtype=jnp.uint32))
    noise = rng.normal(keys, build.latent_shape(config, codec))
    label = jnp.arange(2) % config.data.num_classes if config.data.num_classes else None
    velocity = NetworkVelocity(
        params=found.params, cond=Cond(label=label), model=model, t_max=model.t_max
    )
    return np.asarray(sample(velocity, noise, solver="euler", num_steps=2)[0])


@pytest.mark.parametrize(
    "family",
    # One transformer and one U-Net here; the others go the same way, some 40 s each.
    [f if f in ("dit", "ddpm") else pytest.param(f, marks=pytest.mark.slow) for f in CASES],
)
def test_a_converted_workdir_is_like_any_other(family, tmp_path, tiny_vae, capfd):
    file = write(family, tmp_path)
    run = tmp_path / "run"

    def job(name, **changes):
        config = config_of(family, tiny_vae, file)
        for key, value in changes.items():
            config[key] = value
        return jobs.run_job(name, config, str(changes.get("workdir", run)))

    converted = job("convert")
    assert converted["sha256"] in capfd.readouterr().err
    assert converted["t_max"] == pytest.approx(CASES[family][5], abs=1e-4)

    sampled = job("sample")
    assert sampled["checkpoint_step"] == 0
    with np.load(run / "samples/latents.npz") as arrays:
        latents = arrays["arr_0"]
    config = config_of(family, tiny_vae, file)
    expected = expected_latents(family, file, config)
    np.testing.assert_allclose(latents, expected, atol=1e-4 * np.abs(expected).max())

    job("encode")
    trained = job("train")
    assert trained["steps"] == 1 and np.isfinite(trained["loss"])
    before, after = (
        checkpoints.load_params(run / "checkpoints", ema=False, step=step) for step in (0, 1)
    )
    # One step of Adam at 1e-4 moves no parameter further than that: training went on from them.
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 1.1e-4


def test_guidance_is_refused_until_a_null_label_was_trained(tmp_path, tiny_vae):
    file = write("guided-diffusion", tmp_path)  # its table has no null row
    imported = weights.import_torch("guided-diffusion", file)
    config = config_of("guided-diffusion", tiny_vae, file)
    config.sample.guidance = 2.0
    workdir = Workdir(epath.Path(tmp_path / "run"))
    claim(workdir, config)
    (tmp_path / "run/checkpoints/0").mkdir(parents=True)  # as after --job=convert
    origin.keep(workdir, "unet", {}, 10, {}, null_label=imported.null_label)

    with pytest.raises(UserError, match=r"sample\.guidance=2: .*run know no null label"):
        sample_job.run(config, workdir)
    with pytest.raises(UserError, match=r"job=edit .*run know no null label"):
        editing.make_editor(config, workdir)

    # Labels that were dropped in a training from there on make it known.
    (tmp_path / "run/checkpoints/0").rename(tmp_path / "run/checkpoints/7")
    assert origin.knows_null_label(workdir.root)


@pytest.mark.parametrize("drop, known", [(0.1, True), (0.0, False)])
def test_a_network_trained_here_knows_the_null_label_by_its_labels_dropped(tmp_path, drop, known):
    config = default_config()
    config.train.label_drop = drop
    workdir = Workdir(epath.Path(tmp_path))
    claim(workdir, config)
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    assert origin.knows_null_label(workdir.root) == known
    # A release says so itself, and what starts from it inherits it.
    fresh = Workdir(epath.Path(tmp_path / "fresh"))
    config.init = str(tmp_path)
    origin.adopt(config, fresh)
    assert origin.knows_null_label(fresh.root) == known


def test_a_new_workdir_starts_from_converted_weights(tmp_path, tiny_vae):
    file = write("lfm-dit", tmp_path)
    jobs.run_job("convert", config_of("lfm-dit", tiny_vae, file), str(tmp_path / "run"))
    config = config_of("lfm-dit", tiny_vae, file)
    config.init = str(tmp_path / "run")
    jobs.run_job("encode", config, str(tmp_path / "new"))
    jobs.run_job("train", config, str(tmp_path / "new"))
    old = checkpoints.load_params(tmp_path / "run/checkpoints")
    new = checkpoints.load_params(tmp_path / "new/checkpoints", ema=False)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), old, new)
    assert 0 < max(jax.tree.leaves(moved)) < 1.1e-4
    # The network is written down there, too: raw t in [0, 1] and the row of the null label.
    network = json.loads((tmp_path / "new/network.json").read_text())["fields"]
    assert network["time_scale"] == 1.0 and network["null_row"]

    # A release says as much.
    jobs.run_job("export", config, str(tmp_path / "new"))
    config.init = str(tmp_path / "new/release")
    released = origin.initial_params(config.init)
    jax.tree.map(
        np.testing.assert_array_equal,
        released,
        checkpoints.load_params(tmp_path / "new/checkpoints"),
    )
    again = config_of("lfm-dit", tiny_vae, file)
    again.init = config.init
    origin.adopt(again, Workdir(epath.Path(tmp_path / "third")))
    assert again.model.time_scale == 1.0 and again.model.null_row and again.model.hidden == 64

    config.model.time_scale = 1000.0
    with pytest.raises(UserError, match=r"model\.time_scale=1000\.0: .* have 1\.0"):
        origin.adopt(config, Workdir(epath.Path(tmp_path / "other")))


def test_what_contradicts_the_file_is_refused_before_anything_is_written(tmp_path, tiny_vae):
    file = write("dit", tmp_path)

    def refused(match, family="dit", **changes):
        config = config_of("dit", tiny_vae, file)
        config.convert.family = family
        for key, value in changes.items():
            section, field = key.split("__")
            config[section][field] = value
        with pytest.raises(UserError, match=match):
            jobs.run_job("convert", config, str(tmp_path / "run"))
        assert not (tmp_path / "run/checkpoints").exists()

    refused("DiT.*UNet", model__name="unet")
    refused(r"\[128, 4, 2, 2\]", model__hidden=128)
    refused(r"blocks\.1", model__depth=2)
    refused(r"\[384, 4, 2, 2\]", model__name="DiT-S/2")
    refused("num_classes=0: .* has 10", data__num_classes=0)
    refused("sha256 is [0-9a-f]{64}, expected 00", convert__sha256="00")
    refused("map_layer0", family="lfm-adm")
    refused("no such file", convert__file="/nowhere.pt")
    refused("4 channels.*would see 3", autoencoder__kind="identity")
    refused("'heds'|heads", model__heads=5)


def test_every_field_of_every_network_can_be_told_in_a_config():
    import dataclasses

    from lfm_jax.models import NAMES

    known = set(default_config().model) | {"num_classes", "parent"}
    for module, _ in NAMES.values():
        assert {field.name for field in dataclasses.fields(module)} <= known
