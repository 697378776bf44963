"""Configs load from anywhere, hold only accepted values, and every file has its smoke variant."""

import importlib.util

import jax
import pytest
from checkout import ROOT

from lfm_jax.config import content_hash, default_config, overrides, to_json
from lfm_jax.config_check import check_config
from lfm_jax.config_rules import RULES
from lfm_jax.errors import UserError
from lfm_jax.models import NAMES, count_params, create_model, init_params

FILES = sorted(p.name for p in (ROOT / "configs").glob("*.py"))


def _load(name):
    spec = importlib.util.spec_from_file_location(name[:-3], ROOT / "configs" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_every_experiment_is_accepted_and_its_network_exists(name):
    config = _load(name).get_config()
    if name == "imagenet.py":
        config.data.path = "/images"
    check_config(config)
    fields = overrides(config.model)
    create_model(fields.pop("name"), num_classes=config.data.num_classes, **fields)


@pytest.mark.parametrize("name", [f for f in FILES if f != "base.py"])
def test_every_experiment_has_a_smoke_variant_and_names_it(name):
    module = _load(name)
    check_config(module.get_config("smoke"))
    with pytest.raises(UserError, match="smoke"):
        module.get_config("no_such_variant")


@pytest.mark.parametrize("name", [f for f in FILES if f != "base.py"])
def test_every_docstring_states_command_hardware_and_figure(name):
    text = _load(name).__doc__
    assert f"--config=configs/{name}" in text
    assert "CPU" in text or "Hardware" in text
    assert "docs/results" in text or "Expected figure" in text


@pytest.mark.parametrize(
    "name, variant, side, millions",
    [
        ("imagenet.py", "XL/2", 32, 674.8),
        ("imagenet.py", "L/2", 32, 457.8),
        ("imagenet.py", "adm", 32, 407.4),
        ("celebahq.py", "adm", 32, 153.1),
        ("celebahq.py", "512", 64, 352.2),
        ("celebahq.py", "1024", 128, 531.8),
        ("ffhq.py", "adm", 32, 406.4),
        ("lsun_bedroom.py", "adm", 32, 406.4),
        ("lsun_church.py", "adm", 32, 356.1),
    ],
)
def test_variants_are_the_published_networks(name, variant, side, millions):
    config = _load(name).get_config(variant)
    check_config(config)
    assert config.data.image_size == 8 * side
    fields = overrides(config.model) | {"dtype": "float32"}
    model = create_model(fields.pop("name"), num_classes=config.data.num_classes, **fields)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: init_params(model, key, (side, side, 4)))
    assert count_params(shapes) / 1e6 == pytest.approx(millions, abs=0.06)


COUNTS = ("hidden", "depth", "heads", "patch", "channels", "blocks", "noise_mult")
COUNTS += ("transformer_depth",)


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.steps", 0),
        ("train.schedule", "linear"),
        ("train.label_drop", 1.0),
        ("sample.num_steps", 0),
        ("sample.rtol", -1.0),
        ("data.channels", 2),
        ("autoencoder.kind", "vq"),
        ("mesh.data", 0),
        ("mmd.baked", ("x",)),  # of another kind than the rule compares
        ("mmd.solver", "best"),
        ("mmd.decoder", "tiny"),
        ("mmd.entries", ("features", "filled")),
        ("mmd.network_seeds", (11, 11)),
        ("mmd.token_times", (0.0,)),
        ("mmd.token_times", (0.5, 1.5)),
        ("edit.strengths", (None,)),
        ("edit.strengths", (0.0,)),
        ("edit.strengths", ()),
        ("edit.times", ()),
        ("edit.times", (0.5, 0.5)),
        ("edit.times", (0.5, 1.5)),
        ("evaluate.metrics", ()),
        ("autoencoder.block_out_channels", ()),
        ("autoencoder.block_out_channels", (0, 8)),
        ("autoencoder.block_out_channels", (8.0, 8)),
        ("model.embedding", "sinusoidal"),
        ("model.encoder", "resid"),
        ("model.mult", ()),
        ("model.mult", (1, 0)),
        ("model.mult", ("2",)),
        ("model.mlp_ratio", 0.0),
        ("model.dropout", 1.0),
        ("model.filter_taps", ()),
        ("model.filter_taps", (1, 2, 1)),
        ("model.head_channels", -1),
        ("model.context_dim", -1),
        ("model.out_channels", -1),
        *((f"model.{name}", 0) for name in COUNTS),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_accepted(key, value):
    config = default_config()
    section, field = key.split(".")
    config[section][field] = value
    with pytest.raises(UserError, match=key) as caught:
        check_config(config)
    assert str(value) in str(caught.value) and "expected" in str(caught.value)


def test_fields_of_the_network_take_what_the_networks_take():
    config = default_config()
    for name, (_, preset) in NAMES.items():
        config.model = default_config().model
        for field, value in {"name": name, **preset}.items():
            config.model[field] = value
        check_config(config)
    for field, value in {"mult": (0.5, 1), "head_channels": 0, "context_dim": 0}.items():
        config.model[field] = value
    check_config(config)


def test_every_rule_belongs_to_a_field():
    flat = set()
    for name, value in default_config().items():
        flat |= {f"{name}.{k}" for k in value} if hasattr(value, "items") else {name}
    assert set(RULES) <= flat


def test_fields_that_contradict_are_refused():
    config = default_config()
    config.sample.rtol = 1e-5
    with pytest.raises(UserError, match="both, or neither"):
        check_config(config)
    config = default_config()
    config.sample.guidance, config.train.label_drop = 2.0, 0.0
    with pytest.raises(UserError, match="null label"):
        check_config(config)
    config = default_config()
    config.train.mirror = True
    with pytest.raises(UserError, match=r"encode\.mirror"):
        check_config(config)


@pytest.mark.parametrize(
    "words, changes",
    [
        (r"mmd\.baked=\(1\.05,\):.*mmd\.joint > 0", {"baked": (1.05,), "joint": 0.0}),
        (r"mmd\.target=images:.*expected latents", {"real": "batch"}),
        (r"mmd\.target=teacher:.*expected latents", {"real": "batch", "target": "teacher"}),
        (r"mmd\.entries=\(\): mmd\.features=pixels", {"entries": ()}),
        (r"mmd\.network_seeds=\(\): mmd\.features=latents",
         {"network_seeds": (), "features": ("raw", "latents")}),
        (r"mmd\.token_times=\(\): mmd\.features=tokens",
         {"token_times": (), "features": ("tokens",)}),
        (r"no logits; expected features, maps",
         {"entries": ("features", "logits"), "features": ("latents",), "data.num_classes": 0}),
        (r"mmd\.backprop_steps=1: ddim.*expected 0", {"backprop_steps": 1, "solver": "ddim"}),
        (r"mmd\.decoder=preview: expected autoencoder\.preview", {"decoder": "preview"}),
        # The loss sees 32 samples at a time.
        (r"mmd\.chunks=64:.*the 32 samples of one of train\.accumulate=2", {"chunks": 64}),
        (r"mmd\.groups=10:.*a divisor of the 32 samples", {"groups": 10}),
    ],
)  # fmt: skip
def test_finetuning_options_that_would_do_nothing_or_break_later_are_refused(words, changes):
    config = default_config()
    config.loss, config.train.batch_size, config.train.accumulate = "mmd", 64, 2
    check_config(config)
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        config[section or "mmd"][field] = value
    with pytest.raises(UserError, match=words) as caught:
        check_config(config)
    assert str(caught.value).startswith("--config.mmd.") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"baked": (1.0,), "joint": 0.0},
        {"real": "batch", "target": "latents"},
        {"entries": (), "network_seeds": (), "token_times": (), "features": ("raw",)},
        {"chunks": 32},
        {"groups": 8},
    ],
)
def test_finetuning_options_that_have_their_effect_are_accepted(changes):
    config = default_config()
    config.loss, config.train.batch_size, config.train.accumulate = "mmd", 64, 2
    for key, value in changes.items():
        config.mmd[key] = value
    check_config(config)


def test_the_solvers_of_finetuning_are_those_that_exist():
    from lfm_jax.flow import SOLVERS

    accepts, _ = RULES["mmd.solver"]
    assert all(map(accepts, (*SOLVERS, "ddim"))) and not accepts("sde")


def test_the_content_hash_ignores_order_and_sees_values():
    a = to_json(default_config())
    assert content_hash(a) == content_hash(dict(reversed(a.items())))
    config = default_config()
    config.train.learning_rate *= 2
    assert content_hash(a) != content_hash(to_json(config))


def test_only_a_dit_is_shared_out_over_tensor():
    config = default_config()
    config.mesh.tensor = 2
    check_config(config)
    config.model.name = "unet"
    with pytest.raises(UserError, match=r"mesh\.tensor=2 .*name=unet: expected 1"):
        check_config(config)
