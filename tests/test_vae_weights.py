"""Weights in every dialect, against diffusers' PyTorch classes on shared random weights."""

import json
import re

import jax
import numpy as np
import pytest
from flax import serialization

from lfm_jax import vae
from lfm_jax.errors import UserError
from lfm_jax.vae import keys

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from safetensors.numpy import save_file  # noqa: E402

TOLERANCE = 1e-4  # of the output's standard deviation: float32 rounding through 60 convolutions

SMALL = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
STABLE_DIFFUSION = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 4,
}
FLUX = SMALL | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
LDM_16 = SMALL | {
    "down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2,
    "latent_channels": 16,
    "scaling_factor": 0.2325,
}


def randomized(module, seed=0):
    """Move norms and biases off ones and zeros, where mistakes hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if value.ndim == 1:
                value += 0.2 * torch.randn(value.shape, generator=generator)
    return module.eval()


def torch_vae(config, seed=0):
    torch.manual_seed(seed)
    return randomized(diffusers.AutoencoderKL(**config), seed)


def state(module):
    return {k: v.numpy() for k, v in module.state_dict().items()}


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def worst(ours, theirs):
    """Largest error in units of the standard deviation of what it should be."""
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / theirs.std()


def assert_parity(model, params, oracle, height, width, batch=2):
    x = np.random.default_rng(1).normal(0, 0.5, (batch, height, width, 3)).astype(np.float32)
    shape = (batch, height // model.factor, width // model.factor, model.latent_channels)
    z = np.random.default_rng(2).normal(0, 1, shape).astype(np.float32)

    def both(p, x, z):
        variables = {"params": p}
        return (
            model.apply(variables, x, method="encode"),
            model.apply(variables, z, method="decode"),
        )

    posterior, image = jax.jit(both)(params, x, z)
    with torch.inference_mode():
        expected = oracle.encode(torch.tensor(x).permute(0, 3, 1, 2))
        expected_image = oracle.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
    if hasattr(expected, "latent_dist"):
        gaussian = expected.latent_dist
        errors = [worst(posterior.mean, gaussian.mean), worst(posterior.mode(), gaussian.mode())]
        errors.append(worst(posterior.logvar, gaussian.logvar))
        errors.append(worst(posterior.moments, torch.cat([gaussian.mean, gaussian.logvar], 1)))
    else:
        errors = [worst(posterior.mean, expected.latents)]
    errors.append(worst(image, expected_image))
    assert max(errors) <= TOLERANCE, errors


def old_attention(tensors):
    """The names of diffusers before 2023."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: names[m[0]], k): v for k, v in tensors.items()
    }


def ldm(tensors, levels):
    """CompVis's names and shapes, written down from its modules' attribute names."""
    out = {}
    for name, value in tensors.items():
        attention = ".attentions." in name
        new = name.replace("conv_norm_out", "norm_out")
        new = new.replace("mid_block.attentions.0.", "mid.attn_1.")
        new = new.replace("mid_block.resnets.0.", "mid.block_1.")
        new = new.replace("mid_block.resnets.1.", "mid.block_2.").replace(
            "conv_shortcut", "nin_shortcut"
        )
        new = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", new)
        new = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", new)
        new = re.sub(r"\.resnets\.(\d)\.", r".block.\1.", new)
        new = re.sub(r"\.attentions\.(\d)\.", r".attn.\1.", new)
        new = new.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        if attention:
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])", r"\1", new)
            value = value[:, :, None, None] if value.ndim == 2 else value
        out[new] = value
    return out


def flax_tree(tensors):
    """The nested dict of diffusers' former Flax classes."""
    tree = {}
    for name, value in old_attention(tensors).items():
        *path, leaf = re.sub(r"\.(\d)\.", r"_\1.", name).split(".")
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        node[leaf] = np.ascontiguousarray(value.transpose(order))
    return tree


@pytest.fixture(scope="module")
def small():
    return torch_vae(SMALL)


def test_full_stable_diffusion_config(tmp_path):
    oracle = torch_vae(STABLE_DIFFUSION)
    model, params = vae.load_vae(write(tmp_path, state(oracle), dict(oracle.config)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 83_653_863
    assert model == vae.AutoencoderKL()
    assert_parity(model, params, oracle, 64, 64, batch=1)


@pytest.mark.slow
def test_full_stable_diffusion_config_at_256(tmp_path):
    oracle = torch_vae(STABLE_DIFFUSION, seed=1)
    model, params = vae.load_vae(write(tmp_path, state(oracle), dict(oracle.config)))
    assert_parity(model, params, oracle, 256, 256, batch=1)


@pytest.mark.parametrize(
    ("config", "scale"),
    [(SMALL, (0.18215, 0.0)), (FLUX, (0.3611, 0.1159)), (LDM_16, (0.2325, 0.0))],
    ids=["sd", "flux", "ldm-kl-16"],
)
def test_families_at_small_size_and_not_square(tmp_path, config, scale):
    oracle = torch_vae(config)
    model, params = vae.load_vae(write(tmp_path, state(oracle), dict(oracle.config)))
    assert (model.scaling_factor, model.shift_factor) == scale
    assert_parity(model, params, oracle, 24, 40)


def test_all_dialects_hold_the_same_parameters(tmp_path, small):
    tensors = state(small)
    config = dict(small.config)
    _, expected = vae.load_vae(write(tmp_path / "new", tensors, config))

    def check(source, **options):
        model, params = vae.load_vae(source, **options)
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        return model

    names = old_attention(tensors)
    assert any("proj_attn" in name for name in names)
    check(write(tmp_path / "old", names, config))

    compvis = ldm(tensors, levels=3)
    extra = {"loss.discriminator.weight": np.zeros(3, np.float32)}
    check(write(tmp_path / "ldm", compvis | extra, config))
    under = {f"first_stage_model.{k}": v for k, v in compvis.items()}
    other = {"model.diffusion_model.out.weight": np.zeros(3, np.float32)}
    checkpoint = {"state_dict": {k: torch.tensor(v) for k, v in (under | other).items()}}
    torch.save(checkpoint | {"global_step": 470000}, tmp_path / "sd.ckpt")
    model = check(tmp_path / "sd.ckpt", family="sdxl", norm_groups=8)
    assert model.scaling_factor == 0.13025
    assert model.block_out_channels == (16, 16, 32)
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "bare.pt")
    check(tmp_path / "bare.pt", family="sd", norm_groups=8)

    folder = tmp_path / "flax"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "FlaxAutoencoderKL"}))
    data = serialization.msgpack_serialize(flax_tree(tensors))
    (folder / "diffusion_flax_model.msgpack").write_bytes(data)
    check(folder)


def test_ldm_names_are_those_that_diffusers_converts(small):
    single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    tensors = state(small)
    compvis = {f"first_stage_model.{k}": torch.tensor(v) for k, v in ldm(tensors, 3).items()}
    theirs = single_file_utils.convert_ldm_vae_checkpoint(compvis, dict(small.config))
    ours = keys.canonical({k: v.numpy() for k, v in compvis.items()})
    assert set(theirs) == set(ours) == set(tensors)
    for name, value in theirs.items():
        np.testing.assert_array_equal(value.numpy(), ours[name])


def test_bfloat16_and_float16_files(tmp_path, small):
    from safetensors.torch import save_file as torch_save

    for dtype in (torch.bfloat16, torch.float16):
        rounded = {k: v.to(dtype) for k, v in small.state_dict().items()}
        torch_save(rounded, tmp_path / "ae.safetensors")
        _, params = vae.load_vae(tmp_path / "ae.safetensors", family="sd", norm_groups=8)
        kernel = params["decoder"]["conv_out"]["kernel"]
        expected = rounded["decoder.conv_out.weight"].float().permute(2, 3, 1, 0).numpy()
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(kernel, expected)


def test_taesd(tmp_path):
    torch.manual_seed(0)
    oracle = randomized(diffusers.AutoencoderTiny())
    model, params = vae.load_vae(
        write(tmp_path, state(oracle), dict(oracle.config) | {"_class_name": "AutoencoderTiny"})
    )
    assert (model.factor, model.scaling_factor) == (8, 1.0)
    assert_parity(model, params, oracle, 32, 48)
    vae.save_vae(tmp_path / "again", model, params)
    again = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "again")
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state(oracle)[name])


@pytest.mark.parametrize("channels", [4, 16])
def test_taesds_own_two_files(tmp_path, channels):
    """``taesd_encoder.pth`` and ``taesd_decoder.pth`` (taesd3's have 16 channels)."""
    oracle = randomized(diffusers.AutoencoderTiny(latent_channels=channels))
    halves = {"encoder": {}, "decoder": {}}
    for name, value in oracle.state_dict().items():
        part, _, number, rest = name.split(".", 3)
        shift = part == "decoder"  # theirs begins with the clamp
        halves[part][f"{int(number) + shift}.{rest}"] = value
    for part, tensors in halves.items():
        torch.save(tensors, tmp_path / f"taesd_{part}.pth")
    model, params = vae.load_vae(tmp_path)
    assert model.latent_channels == channels
    if channels == 4:
        assert_parity(model, params, oracle, 16, 24)
    _, again = vae.load_vae(tmp_path / "taesd_decoder.pth")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    (tmp_path / "taesd_encoder.pth").unlink()
    with pytest.raises(UserError, match=r"expected taesd_encoder\.pth beside it"):
        vae.load_vae(tmp_path / "taesd_decoder.pth")
    torch.save(halves["encoder"], tmp_path / "other.pth")
    with pytest.raises(UserError, match="half an autoencoder; expected NAME_encoder"):
        vae.load_vae(tmp_path / "other.pth")


@pytest.mark.parametrize("config", [SMALL, FLUX, LDM_16], ids=["sd", "flux", "ldm-kl-16"])
def test_what_we_save_opens_in_diffusers(tmp_path, config):
    oracle = torch_vae(config)
    model, params = vae.load_vae(write(tmp_path / "a", state(oracle), dict(oracle.config)))
    vae.save_vae(tmp_path / "b", model, params)
    again, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state(oracle)[name])
    for key in ("scaling_factor", "shift_factor", "down_block_types", "use_quant_conv"):
        assert again.config[key] == oracle.config[key]
    reloaded, _ = vae.load_vae(tmp_path / "b")
    assert reloaded == model
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_our_own_fresh_small_model_opens_in_diffusers(tmp_path):
    model = vae.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_groups=4, mid_attention=False
    )
    params = vae.init_vae(model, jax.random.key(3))
    oracle = diffusers.AutoencoderKL.from_pretrained(vae.save_vae(tmp_path, model, params)).eval()
    assert_parity(model, params, oracle, 12, 8)


def hub_cache(root, repo, revision, files):
    """The layout that huggingface_hub keeps on disk."""
    folder = root / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for name, (blob, data) in files.items():
        (folder / "blobs" / blob).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return folder


def test_hub_repository_from_the_cache_with_its_checksum(tmp_path, small, monkeypatch):
    import hashlib

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = write(tmp_path / "src", state(small))
    data = (source / "diffusion_pytorch_model.safetensors").read_bytes()
    blob = hashlib.sha256(data).hexdigest()
    config = json.dumps(dict(small.config)).encode()
    repo, revision = "stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493"
    folder = hub_cache(
        tmp_path / "hub",
        repo,
        revision,
        {"config.json": ("c" * 40, config), "diffusion_pytorch_model.safetensors": (blob, data)},
    )
    model, _ = vae.load_vae(repo, cache_dir=tmp_path / "hub")
    assert model.block_out_channels == (16, 16, 32)
    (folder / "blobs" / blob).write_bytes(data[:-1] + b"x")
    with pytest.raises(UserError, match=f"sha256 is .* expected {blob}"):
        vae.load_vae(repo, cache_dir=tmp_path / "hub")
    with pytest.raises(UserError, match=r"stabilityai/sd-vae-ft-ema: revision f04b2c.* not in the"):
        vae.load_vae("stabilityai/sd-vae-ft-ema", cache_dir=tmp_path / "hub")


def test_bad_tensors_are_named(tmp_path, small):
    tensors, config = state(small), dict(small.config)
    name = "decoder.up_blocks.1.resnets.0.norm2.weight"
    without = {k: v for k, v in tensors.items() if k != name}
    with pytest.raises(UserError, match=f"tensor {re.escape(name)} is missing"):
        vae.load_vae(write(tmp_path / "missing", without, config))
    extra = tensors | {"decoder.surprise.weight": np.zeros(2, np.float32)}
    with pytest.raises(UserError, match=r"tensor decoder\.surprise\.weight is no part"):
        vae.load_vae(write(tmp_path / "extra", extra, config))
    name = "decoder.conv_in.weight"
    turned = tensors | {name: tensors[name].swapaxes(0, 1)}
    with pytest.raises(
        UserError, match=rf"tensor {name} has shape \(4, 32.*expected \(32, 4.*trans"
    ):
        vae.load_vae(write(tmp_path / "turned", turned, config))


def test_numbers_that_would_blacken_every_image_are_named(tmp_path, small):
    tensors, config = state(small), dict(small.config)
    name = "decoder.conv_in.bias"
    for value in (np.nan, np.inf, 1e300):
        changed = tensors[name].astype(np.float64)
        changed[1] = value
        with pytest.raises(UserError, match=rf"tensor {name} holds 1 values that are NaN"):
            vae.load_vae(write(tmp_path / "nan", tensors | {name: changed}, config))
    for key, value in (("scaling_factor", 0), ("scaling_factor", 1e-60),
                       ("scaling_factor", np.inf), ("shift_factor", np.nan)):  # fmt: skip
        with pytest.raises(UserError, match=rf"config\.json: {key} \S+; expected a finite number"):
            vae.load_vae(write(tmp_path / "scale", tensors, config | {key: value}))


def test_a_bare_files_bad_tensor_is_named(tmp_path, small):
    """Though it is the shapes that say there what was expected."""
    tensors = state(small)

    def load(changed):
        path = write(tmp_path / "bare", changed) / "diffusion_pytorch_model.safetensors"
        return vae.load_vae(path, family="sd", norm_groups=8)

    for name, axes in (("decoder.conv_in", (1, 0, 2, 3)), ("encoder.conv_out", (2, 3, 1, 0))):
        name = f"{name}.weight"
        with pytest.raises(UserError, match=rf"tensor {name} has shape .*\(transposed\?\)"):
            load(tensors | {name: tensors[name].transpose(axes)})
    level = "encoder.down_blocks.1."
    with pytest.raises(UserError, match=rf"tensor {re.escape(level)}\S+ is missing"):
        load({k: v for k, v in tensors.items() if not k.startswith(level)})


def test_bad_files_are_named(tmp_path, small):
    tensors, config = state(small), dict(small.config)
    folder = write(tmp_path / "a", tensors, config)
    path = folder / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="sha256 is"):
        vae.load_vae(folder, sha256="0" * 64)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        vae.load_vae(folder)
    with pytest.raises(UserError, match="no file of weights"):
        vae.load_vae(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        vae.load_vae(tmp_path / "nowhere")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"unknown suffix; accepted: \.safetensors"):
        vae.load_vae(tmp_path / "weights.h5")


def test_bad_pickles_are_named_and_run_nothing(tmp_path, small):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not be printed",))

    torch.save({"state_dict": {"encoder.conv_in.weight": Evil()}}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="holds more than tensors"):
        vae.load_vae(tmp_path / "evil.ckpt")
    torch.save(small.state_dict(), tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        vae.load_vae(tmp_path / "cut.pt")


def test_unknown_families_and_configs_are_named(tmp_path, small):
    tensors, config = state(small), dict(small.config)
    folder = write(tmp_path / "a", tensors, config | {"_class_name": "AutoencoderDC"})
    with pytest.raises(UserError, match="'AutoencoderDC' is unknown; accepted: AutoencoderKL"):
        vae.load_vae(folder)
    with pytest.raises(UserError, match="family: 'sd4' is unknown; choose one of sd, sdxl"):
        vae.load_vae(folder, family="sd4")
    write(folder, tensors, config | {"act_fn": "relu"})
    with pytest.raises(UserError, match="act_fn 'relu'; accepted: silu"):
        vae.load_vae(folder)
    write(folder, tensors, config)
    with pytest.raises(UserError, match="family: 'flux' has scale and shift"):
        vae.load_vae(folder, family="flux")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        vae.load_vae(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="name the family"):
        vae.load_vae(folder, norm_groups=8)
    write(folder, {"transformer.weight": np.zeros(2, np.float32)})
    with pytest.raises(
        UserError, match=r"no autoencoder found \(first tensor: transformer\.weight"
    ):
        vae.load_vae(folder)


def test_saving_checks_before_it_writes(tmp_path):
    model = vae.AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_groups=4)
    with pytest.raises(UserError, match="is missing"):
        vae.save_vae(tmp_path / "out", model, {"encoder": {}})
    assert not (tmp_path / "out").exists()
