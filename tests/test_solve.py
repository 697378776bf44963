"""The sampler's compiled programs on few-step trees, and which steps a config asks for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkout import ROOT
from etils import epath

from lfm_jax import mmd, rng
from lfm_jax.conditions import Semantic, encoded, init_conditioned
from lfm_jax.errors import UserError
from lfm_jax.experiments import neighbour
from lfm_jax.flow import NetworkVelocity, autoguidance, classifier_free, make_grid, sample
from lfm_jax.jobs import guide, solve
from lfm_jax.jobs.sample_options import check_solver, class_names, fixed_steps
from lfm_jax.models import Cond, create_model, init_params
from lfm_jax.vae import identity_codec, to_uint8
from lfm_jax.workdir import Workdir

SHAPE = (4, 4, 1)
INDICES, LABELS = jnp.arange(3, dtype=jnp.uint32), jnp.arange(3, dtype=jnp.int32)


@pytest.fixture(scope="module")
def network():
    """A small DiT whose zero-initialised layers were moved: fresh ones answer 0."""
    model = create_model(
        "DiT", hidden=16, depth=1, heads=2, patch=2, num_classes=3, scan_blocks=False
    )
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: p + jnp.asarray(0.3 * draw.normal(size=p.shape), p.dtype),
        init_params(model, jax.random.key(0), SHAPE),
    )
    return model, params


def plan_of(model, *, scale=1.0, **solver):
    usual = {"solver": "euler", "num_steps": 2, "grid": "uniform", "rtol": None, "atol": None}
    usual |= {"error_norm": "sample", "sde": "", "eta": 0.0}
    return solve.Plan(
        model=model,
        latent_shape=SHAPE,
        num_classes=3,
        seed=0,
        guidance=(("scale", scale), ("interval", (0.0, 1.0)), ("channels", None)),
        solver=tuple((usual | solver).items()),
    )


def drawn(plan, params):
    images, latents, stats = solve.generate(
        plan, identity_codec(1), params, INDICES, LABELS, {}, guide.OtherNetworks()
    )
    return np.asarray(images), latents, stats


def strip(plan, params, count):
    states = solve.snapshots(
        plan, count, identity_codec(1), params, INDICES, LABELS, {}, guide.OtherNetworks()
    )
    return [np.asarray(x).astype(int) for x in states]


def velocity_and_noise(plan, params):
    noise = rng.normal(plan.keys(rng.Stream.SAMPLE, INDICES), SHAPE)
    return NetworkVelocity(params=params, model=plan.model, cond=Cond(label=LABELS)), noise


def tuned(params):
    """Three trained steps, far from any grid that has a name."""
    solver = mmd.new_solver(make_grid("uniform", 3))
    solver["start"] = jnp.float32(0.8)
    solver["logits"] += jnp.array([0.7, 0.0, -0.4])
    solver["scales"] = jnp.array([1.3, 0.7, 1.1])
    return {**params, mmd.FEW_STEP: {"solver": solver}}


def test_a_weak_network_sees_the_condition_through_its_own_encoder(network):
    """Encoders are trained with their networks: one is nothing to another."""
    model, _ = network
    condition = Semantic(num_classes=3, image_size=8, factor=2, channels=2)
    draw = np.random.default_rng(2)
    strong, weak = (
        jax.tree.map(
            lambda p: p + jnp.asarray(0.3 * draw.normal(size=p.shape), p.dtype),
            init_conditioned(condition, model, jax.random.key(3), SHAPE),
        )
        for _ in range(2)
    )
    plan = dataclasses.replace(
        plan_of(model, num_steps=1),
        condition=(condition, 1.0),
        beyond=(
            ("weak_scale", 3.0),
            ("classifier_scale", 0.0),
            ("max_weight", 1.0),
        ),
    )
    picked = {"map": draw.integers(0, 3, (3, 8, 8)).astype(np.uint8)}
    beside = guide.OtherNetworks(weak=NetworkVelocity(params=weak, model=model))
    _, latents, _ = solve.generate(plan, None, strong, INDICES, LABELS, picked, beside)

    def velocity(params):
        cond = encoded(condition, params, picked, jnp.ones(3, bool)).replace(label=LABELS)
        return NetworkVelocity(params=params, model=model, cond=cond)

    guided = autoguidance(velocity(strong), velocity(weak), scale=3.0)
    wanted, _ = sample(guided, velocity_and_noise(plan, strong)[1], num_steps=1)
    np.testing.assert_allclose(latents, wanted, atol=1e-4)


def test_a_network_told_the_steps_alone_is_guided_as_it_was_trained(network):
    model, params = network
    tree = mmd.trainable("all", params, jax.random.key(0), several_steps=True)
    tree[mmd.FEW_STEP]["offset"]["out"] += 0.1
    plan = plan_of(model, scale=1.5)
    _, latents, stats = drawn(plan, tree)
    assert int(stats["network_calls"]) == 2 * int(stats["nfe"][0])
    velocity, noise = velocity_and_noise(plan, mmd.deploy(tree, num_steps=2)[0])
    wanted, _ = sample(classifier_free(velocity, num_classes=3, scale=1.5), noise, num_steps=2)
    np.testing.assert_allclose(latents, wanted, atol=1e-5)


def test_the_strip_follows_the_trained_steps_to_the_samples(network):
    """Of a solver with a memory, too."""
    model, params = network
    tree, plan = tuned(params), plan_of(model, num_steps=3, solver="ab2")
    states, estimates = strip(plan, tree, 8)  # as many as there are: four
    images, _, _ = drawn(plan, tree)
    assert states.shape == (4, *images.shape)
    np.testing.assert_allclose(states[-1], images, atol=1)
    np.testing.assert_allclose(estimates[-1], images, atol=1)
    base = strip(plan, params, 8)[0]
    assert np.abs(base[1:] - states[1:]).max(axis=(1, 2, 3, 4)).min() > 5


def test_every_state_of_a_trained_strip_is_that_of_the_loop(network):
    model, params = network
    tree, plan = tuned(params), plan_of(model, num_steps=3)
    states, estimates = strip(plan, tree, 4)
    trained = tree[mmd.FEW_STEP]["solver"]
    times = mmd.solver_times(trained, 3)
    velocity, x = velocity_and_noise(plan, params)
    for i, (t, after) in enumerate(itertools.pairwise(times)):
        slope = trained["scales"][i] * velocity(x, jnp.full(3, t))
        np.testing.assert_allclose(states[i], np.asarray(to_uint8(x)).astype(int), atol=1)
        landing = np.asarray(to_uint8(x - t * slope)).astype(int)
        np.testing.assert_allclose(estimates[i], landing, atol=1)
        x = x + (after - t) * slope


def test_the_strip_of_ddim_is_that_of_euler(network):
    model, params = network
    grid = (0.9, 0.4, 0.0)
    plan = plan_of(model, solver="ddim", grid=grid)
    found = strip(plan, params, 3)
    for a, b in zip(found, strip(plan_of(model, grid=grid), params, 3), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found[0][-1], drawn(plan, params)[0], atol=1)


@pytest.mark.parametrize("way", [{"sde": "heun", "eta": 1.0}, {"rtol": 1e-3, "solver": "heun"}])
def test_trained_steps_are_not_passed_by(network, way):
    model, params = network
    with pytest.raises(UserError, match=rf"sample\.{next(iter(way))}=.*trained grid"):
        drawn(plan_of(model, num_steps=3, **way), tuned(params))


# ---- which steps a config asks for


def few_step(**sample):
    config = neighbour(str(ROOT / "configs" / "base.py"), "mmd_digits.py", "smoke")
    config.mmd.num_steps, config.mmd.grid = 1, "0.8,0"
    for key, value in sample.items():
        config.sample[key] = value
    return config


def test_steps_that_the_times_contradict_are_refused():
    with pytest.raises(UserError, match=r"sample\.num_steps=8: .*0\.8,0 make 1; expected 1, or"):
        check_solver(few_step(num_steps=8))


@pytest.mark.parametrize(
    ("sample", "steps"),
    [
        ({}, 1),
        ({"grid": "1,0.5,0"}, 2),  # num_steps follows the training: the times are the user's word
        ({"grid": "1,0.5,0", "num_steps": 2}, 2),
        ({"grid": "uniform", "num_steps": 8}, 8),
    ],
)
def test_a_few_step_sampler_takes_the_steps_of_its_times(sample, steps):
    config = few_step(**sample)
    check_solver(config)
    assert fixed_steps(config) == steps


def test_a_plain_flow_takes_the_steps_of_its_times():
    config = neighbour(str(ROOT / "configs" / "base.py"), "digits.py")
    assert fixed_steps(config) == config.sample.num_steps == 16
    config.sample.grid = "1,0.6,0.3,0"
    assert fixed_steps(config) == 3


# ---- who needs a null label


@pytest.mark.parametrize(("baked", "refused"), [((), True), ((1.5,), True), ((1.0, 2.0), False)])
def test_only_a_network_that_is_told_its_scale_needs_no_null_label(baked, refused, tmp_path):
    (tmp_path / "network.json").write_text('{"null_label": false}')
    config, workdir = few_step(guidance=2.0), Workdir(epath.Path(tmp_path))
    config.mmd.baked = baked
    if not refused:
        return guide.check_null_label(config, workdir)
    with pytest.raises(UserError, match=r"sample\.guidance=2: .*no null label"):
        guide.check_null_label(config, workdir)


def test_classes_are_numbered_where_the_images_that_name_them_are_not_at_hand():
    """Sampling, and training on a cache, need no images: an imported network has none."""
    config = neighbour(str(ROOT / "configs" / "base.py"), "imagenet.py")
    assert config.data.path is None
    assert class_names(config, most=3) == ["0", "1", "2"]
    config.data.class_names = ("tench",)
    assert class_names(config, most=3) == ["tench", "1", "2"]
    config.data.num_classes = 0
    assert class_names(config) == []
