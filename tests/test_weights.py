"""Published weights: each family against an independent network with the same random weights."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax import weights
from lfm_jax.errors import UserError
from lfm_jax.models import Cond, conventions, create_model
from lfm_jax.weights.dit import diffusers_config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import torch_networks as theirs  # noqa: E402

TOLERANCE = 1e-4  # relative to the largest output: float32 through some 30 layers

MULT = {"channels": 32, "mult": (1, 2), "blocks": 1}
GUIDED = {**MULT, "factors": (2,), "cin": 3, "cout": 6, "heads": 4}

# family -> (their network, side, channels in, classes)
CASES = {
    "lfm-dit": (lambda: theirs.DiT(64, 2, 4, 2, 4, 4, 8, 11), 8, 4, 10),
    "lfm-dit, unconditional": (lambda: theirs.DiT(64, 2, 4, 2, 4, 4, 8, 1), 8, 4, 0),
    "lfm-dit, spatial condition": (lambda: theirs.DiT(64, 2, 4, 4, 9, 4, 8, 1), 8, 9, 0),
    "dit": (lambda: theirs.DiT(64, 2, 4, 2, 4, 8, 8, 11), 8, 4, 10),
    "sit": (lambda: theirs.DiT(64, 2, 4, 2, 4, 8, 8, 11), 8, 4, 10),
    "lfm-adm": (lambda: theirs.EdmUNet(8, 64, (1, 2), 1, (4,), 4, 4, classes=10), 8, 4, 10),
    "lfm-unet": (
        lambda: theirs.GuidedUNet(32, (1, 2, 2), 2, (4,), 4, 9, 4),
        8,
        9,
        0,
    ),
    "guided-diffusion": (
        lambda: theirs.GuidedUNet(**GUIDED, classes=10, inside=True, head_channels=32),
        8,
        3,
        10,
    ),
    "guided-diffusion-64": (
        lambda: theirs.GuidedUNet(
            64, (0.5, 1, 1), 1, (2,), 0, 3, 6, inside=True, head_channels=32, new_order=True
        ),
        8,
        3,
        0,
    ),
    "guided-diffusion, plain": (
        lambda: theirs.GuidedUNet(**GUIDED | {"cout": 3}, film=False, head_channels=32),
        8,
        3,
        0,
    ),
}


def overrides_of(case):
    """What files of unpublished sizes do not tell."""
    if "dit" in case or "sit" in case:
        return {"heads": 4}
    return {"head_channels": 32} if case.startswith("guided") else {}


def write(network, path, prefix=""):
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(state, path)
    return state


def nhwc(x):
    return np.asarray(x.detach()).transpose(0, 2, 3, 1)


def inputs(side, channels, classes, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, side, side, channels)).astype(np.float32)
    t = np.array([0.05, 0.5, 0.93], np.float32)
    return x, t, rng.integers(0, classes, 3) if classes else None


def run(model, params, x, t, cond=None):
    return jax.jit(lambda p, x, t: model.apply({"params": p}, x, t, cond))(params, x, t)


def raw_network(imported):
    """The network without the translation of its convention: what the file's own code computes."""
    return create_model(imported.name, **{**imported.overrides, "convention": "flow"})


def import_case(case, folder):
    """A case's network with random weights, its state, and the same network imported."""
    make, _, _, _ = CASES[case]
    network = theirs.randomise(make())
    state = write(network, folder / "in.pth", "module." if "," in case else "")
    return (
        network,
        state,
        weights.import_torch(case.split(",")[0], folder / "in.pth", **overrides_of(case)),
    )


def relative_error(ours, expected):
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def forward_error(case, folder):
    """Largest error of the imported network's output, relative to the largest output."""
    network, _, found = import_case(case, folder)
    _, side, channels, classes = CASES[case]
    x, t, y = inputs(side, channels, classes)
    out = found.latent_shape[2]
    cond = Cond(
        label=None if y is None else jnp.asarray(y),
        spatial=jnp.asarray(x[..., out:]) if channels > out else None,
    )
    time = torch.from_numpy(t * found.overrides["time_scale"])
    with torch.no_grad():
        label = () if y is None else (torch.from_numpy(y),)
        expected = network(torch.from_numpy(x.transpose(0, 3, 1, 2)), time, *label)
    ours = run(raw_network(found), found.params, x[..., :out], t, cond)
    return relative_error(ours, nhwc(expected)[..., :out])


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_an_independent_network(case, tmp_path):
    assert forward_error(case, tmp_path) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case, tmp_path):
    family, (_, side, _, _) = case.split(",")[0], CASES[case]
    _, state, found = import_case(case, tmp_path)
    file = tmp_path / "out.pth"
    options = {"model": found.model(), "latent_size": side, "prefix": ""}
    weights.save_torch(family, found.params, file, **options)
    back = torch.load(file, weights_only=True)
    assert set(back) == {name.removeprefix("module.") for name in state}
    for name, value in state.items():
        mine = back[name.removeprefix("module.")]
        if value.shape == mine.shape and "pos_embed" not in name:
            assert torch.equal(value, mine), name
        else:  # the learned variance is not kept, the table is computed anew
            assert "final_layer" in name or name.startswith("out.2") or "pos_embed" in name
    again = weights.load_torch(family, file, model=found.model())
    jax.tree.map(np.testing.assert_array_equal, found.params, again)


def import_diffusers_dit(folder):
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    )  # fmt: skip
    theirs.randomise(network)
    with torch.no_grad():  # a DiT has one embedder: diffusers' copies are equal in every real file
        for name, value in network.transformer_blocks[0].norm1.emb.state_dict().items():
            network.transformer_blocks[1].norm1.emb.state_dict()[name].copy_(value)
    network.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    found = weights.import_torch("diffusers-dit", file, heads=4)
    expected = call_diffusers(network, 8, 4, 10)[..., :4]
    x, _, y = inputs(8, 4, 10)
    cond = Cond(label=jnp.asarray(y))
    ours = run(raw_network(found), found.params, x, np.float32(INDEX / 1000), cond)
    return network, found, relative_error(ours, expected)


INDEX = np.array([0, 421, 999])


def call_diffusers(network, side, channels, classes):
    x, _, y = inputs(side, channels, classes)
    label = () if y is None else (torch.from_numpy(y),)
    with torch.no_grad():
        image = torch.from_numpy(x.transpose(0, 3, 1, 2))
        return nhwc(network.eval()(image, torch.from_numpy(INDEX), *label).sample)


def import_diffusers_ddpm(folder):
    network = diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, norm_eps=1e-6,
        block_out_channels=(32, 64, 64), downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None,
    )  # fmt: skip
    write(theirs.randomise(network), folder / "in.pt")
    found = weights.import_torch("diffusers-ddpm", folder / "in.pt")
    x, _, _ = inputs(32, 3, 0)
    ours = run(raw_network(found), found.params, x, np.float32(INDEX / 1000))
    return network, found, relative_error(ours, call_diffusers(network, 32, 3, 0))


DIFFUSERS = {
    "diffusers DiTTransformer2DModel": import_diffusers_dit,
    "diffusers UNet2DModel": import_diffusers_ddpm,
}


def test_diffusers_dit_in_and_out(tmp_path):
    network, found, error = import_diffusers_dit(tmp_path)
    assert error < TOLERANCE
    out = tmp_path / "out.safetensors"
    weights.save_torch("diffusers-dit", found.params, out, model=found.model())
    other = diffusers.DiTTransformer2DModel.from_config(network.config | {"out_channels": 4})
    state = weights.read_tensors(out).tensors
    other.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    expected = call_diffusers(network, 8, 4, 10)[..., :4]
    assert relative_error(call_diffusers(other, 8, 4, 10), expected) < 1e-5
    folder = tmp_path / "folder"
    folder.mkdir()
    out.rename(folder / "diffusion_pytorch_model.safetensors")
    described = diffusers_config(found.model(), 8, 4)
    (folder / "config.json").write_text(json.dumps(described))
    opened = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    assert relative_error(call_diffusers(opened, 8, 4, 10), expected) < 1e-5
    out = folder / "diffusion_pytorch_model.safetensors"
    again = weights.load_torch("diffusers-dit", out, model=found.model())
    jax.tree.map(np.testing.assert_array_equal, found.params, again)


def test_ddpm_against_diffusers_and_through_ddim_names(tmp_path):
    _, found, error = import_diffusers_ddpm(tmp_path)
    assert error < TOLERANCE
    assert found.latent_shape == (32, 32, 3) and found.t_max == pytest.approx(0.9937, abs=1e-4)

    weights.save_torch("ddpm", found.params, tmp_path / "raw.ckpt", model=found.model())
    state = torch.load(tmp_path / "raw.ckpt", weights_only=True)
    some = ("temb.dense.0.weight", "down.1.attn.0.proj_out.bias", "mid.block_2.temb_proj.weight")
    assert {*some, "up.2.upsample.conv.weight", "up.0.block.1.nin_shortcut.weight"} <= set(state)
    assert state["mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    # DDIM's training checkpoint: a list, the model behind DataParallel, the average at the end.
    raw = {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
    torch.save([raw, {"state": {}}, 7, 99, state], tmp_path / "list.ckpt")
    again = weights.load_torch("ddpm", tmp_path / "list.ckpt", model=found.model())
    jax.tree.map(np.testing.assert_array_equal, found.params, again)
    zeros = weights.load_torch("ddpm", tmp_path / "list.ckpt", weights="raw")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))


def test_time_runs_the_right_way_in_sit(tmp_path):
    """SiT: t = 1 is data and the velocity points there."""
    network = theirs.randomise(theirs.DiT(64, 2, 4, 2, 4, 8, 8, 11))
    write(network, tmp_path / "sit.pt")
    found = weights.import_torch("sit", tmp_path / "sit.pt", heads=4)
    x, t, y = inputs(8, 4, 10)
    with torch.no_grad():
        expected = network(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(1 - t), torch.from_numpy(y)
        )
    expected = -nhwc(expected)[..., :4]
    cond = Cond(label=jnp.asarray(y))
    ours = run(found.model(), found.params, x, t, cond)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.abs(expected).max())

    # A network of our own convention, told to SiT's code: the same velocity again.
    flow = create_model("DiT", **{**found.overrides, "convention": "flow"})
    weights.save_torch("sit", found.params, tmp_path / "mine.pt", model=flow, latent_size=8)
    turned = weights.import_torch("sit", tmp_path / "mine.pt", heads=4)
    ours = run(turned.model(), turned.params, x, t, cond)
    expected = run(flow, found.params, x, t, cond)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.abs(expected).max())


def cosine_betas():
    def signal(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    steps = np.arange(1000)
    return np.minimum(1 - signal((steps + 1) / 1000) / signal(steps / 1000), 0.999)


@pytest.mark.parametrize(
    ("convention", "betas", "last"),
    [("vp", np.linspace(1e-4, 0.02, 1000), 0.9937), ("vp_cosine", cosine_betas(), 0.99995)],
)
def test_vp_noise_prediction_becomes_the_gaussian_velocity(convention, betas, last):
    """Data N(mu, s^2): the exact noise predictor, translated, is the closed-form velocity."""
    mu, s = 0.7, 0.4
    kept = np.cumprod(1 - betas)
    log_snr = np.log(kept / (1 - kept))

    def velocity(x, t):
        x_vp, time = conventions.enter(convention, x, t)
        snr = jnp.interp(time * 1000, jnp.arange(1000.0), jnp.asarray(log_snr, jnp.float32))
        a, sigma = (jnp.sqrt(jax.nn.sigmoid(z))[:, None, None, None] for z in (snr, -snr))
        eps = sigma * (x_vp - a * mu) / (a**2 * s**2 + sigma**2)
        return conventions.leave(convention, eps, x, t)

    t_max = conventions.t_max(convention)
    assert t_max == pytest.approx(last, abs=5e-5)
    t = jnp.linspace(0.02, t_max, 200)
    x = jax.random.normal(jax.random.key(0), (200, 1, 1, 1))
    r = t[:, None, None, None]
    score = (x - (1 - r) * mu) / ((1 - r) ** 2 * s**2 + r**2)
    expected = r * score - (mu + (1 - r) * s**2 * score)
    np.testing.assert_allclose(velocity(x, t), expected, atol=2e-3 * float(jnp.abs(expected).max()))

    # Integrated from t_max down, noise of the right size becomes the data.
    x = jax.random.normal(jax.random.key(1), (20000, 1, 1, 1)) * t_max + (1 - t_max) * mu
    grid = np.linspace(t_max, 0, 201, dtype=np.float32)

    def step(x, ends):
        return x + (ends[1] - ends[0]) * velocity(x, jnp.full(len(x), ends[0])), None

    x = jax.jit(lambda x: jax.lax.scan(step, x, np.stack([grid[:-1], grid[1:]], 1))[0])(x)
    assert float(x.mean()) == pytest.approx(mu, abs=0.02)
    assert float(x.std()) == pytest.approx(s, abs=0.02)


class Evil:
    def __reduce__(self):
        return (os.system, ("echo owned",))


def refused(family, file, *words, **options):
    with pytest.raises(UserError) as error:
        weights.load_torch(family, file, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_bad_files_are_refused_with_the_first_culprit(tmp_path):
    network = theirs.randomise(theirs.DiT(64, 2, 4, 2, 4, 4, 8, 11))
    state = write(network, tmp_path / "good.pt")
    small = create_model(
        "DiT", hidden=64, depth=1, heads=4, patch=2, num_classes=10, time_scale=1.0
    )
    other = create_model(
        "DiT", hidden=32, depth=2, heads=4, patch=2, num_classes=10, time_scale=1.0
    )
    refused("lfm-dit", tmp_path / "none.pt", "no such file")
    refused("lfm-dot", tmp_path / "good.pt", "lfm-dot", "lfm-dit")
    refused("lfm-adm", tmp_path / "good.pt", "map_layer0.weight", "missing")
    refused("ddpm", tmp_path / "good.pt", "conv_in.weight", "missing")
    refused("lfm-unet", tmp_path / "good.pt", "out.2.weight", "missing")
    refused("lfm-dit", tmp_path / "good.pt", "[64, 4, 2, 2]", "[32, 4, 2, 2]", model=other)
    refused("lfm-dit", tmp_path / "good.pt", "blocks.1.", "more than", model=small)
    refused("lfm-dit", tmp_path / "good.pt", "UNet", model=create_model("unet"))
    refused("lfm-dit", tmp_path / "good.pt", "weights", "ema", weights="ema")
    refused("lfm-dit", tmp_path / "good.pt", "sha256 is", "expected 12ab", sha256="12ab")

    torch.save({k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}, tmp_path / "a.pt")
    refused("lfm-dit", tmp_path / "a.pt", "blocks.1.mlp.fc1.bias", "missing")
    torch.save({**state, "extra.weight": torch.zeros(3, 2)}, tmp_path / "b.pt")
    refused("lfm-dit", tmp_path / "b.pt", "extra.weight", "[3, 2]")
    torch.save({**state, "pos_embed": torch.zeros(1, 16, 64)}, tmp_path / "c.pt")
    refused("lfm-dit", tmp_path / "c.pt", "pos_embed", "[1, 16, 64]")
    torch.save({"model": state, "evil": Evil()}, tmp_path / "d.pt")
    refused("lfm-dit", tmp_path / "d.pt", "refused", "weights_only")
    (tmp_path / "e.pt").write_bytes(b"not a checkpoint")
    refused("lfm-dit", tmp_path / "e.pt", "e.pt")
    (tmp_path / "f.safetensors").write_bytes(b"not a checkpoint")
    refused("lfm-dit", tmp_path / "f.safetensors", "safetensors")


def test_export_refuses_what_the_other_side_cannot_express(tmp_path):
    ours = create_model("DiT", hidden=64, depth=1, heads=4, patch=2)
    params = jax.tree.map(
        np.asarray, ours.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1))
    )
    with pytest.raises(UserError, match="time_scale"):
        weights.save_torch("lfm-dit", params["params"], tmp_path / "x.pth", model=ours)
    with pytest.raises(UserError, match="a ddpm file holds a DDPM, the model is a DiT"):
        weights.save_torch("ddpm", params["params"], tmp_path / "x.pth", model=ours)
    assert not list(tmp_path.iterdir())


def test_nested_checkpoints_prefer_the_average(tmp_path):
    import argparse

    network = theirs.randomise(theirs.DiT(64, 1, 4, 2, 4, 4, 8, 11))
    ema = {f"module.{k}": v for k, v in network.state_dict().items()}
    raw = {k: torch.zeros_like(v) if "pos" not in k else v for k, v in network.state_dict().items()}
    args = argparse.Namespace(model="DiT-S/2")
    torch.save({"model": raw, "ema": ema, "opt": {"lr": 1}, "args": args}, tmp_path / "n.pt")
    found = weights.import_torch("lfm-dit", tmp_path / "n.pt")
    assert found.weights == "ema" and np.any(found.params["patch"]["kernel"])
    raw_params = weights.load_torch("lfm-dit", tmp_path / "n.pt", weights="raw")
    assert not np.any(raw_params["patch"]["kernel"])
    assert len(found.sha256) == 64


def test_a_url_is_fetched_once_into_the_users_cache(tmp_path, monkeypatch):
    import functools
    import http.server
    import threading

    network = theirs.randomise(theirs.DiT(64, 1, 4, 2, 4, 4, 8, 11))
    (tmp_path / "site").mkdir()
    write(network, tmp_path / "site" / "model.pt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/model.pt"
    first = weights.read_tensors(url)
    refused("lfm-dit", url.replace("model", "absent"), "download failed")
    # What a site answers that wants a click first is no file of weights, and is not kept as one.
    (tmp_path / "site/page.html").write_text("<html>click here</html>")
    refused("lfm-dit", url.replace("model.pt", "page.html"), "is a web page")
    server.shutdown()
    server.server_close()
    again = weights.read_tensors(url)
    assert first.sha256 == again.sha256 == weights.read_tensors(tmp_path / "site/model.pt").sha256
    assert [p.name for p in (tmp_path / "cache").rglob("*.pt")] == ["model.pt"]
