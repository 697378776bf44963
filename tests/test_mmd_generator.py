"""The few-step generator: what it returns, what its gradient is, what it remembers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import Gaussian

from lfm_jax import mmd, rng
from lfm_jax.errors import UserError
from lfm_jax.flow import NetworkVelocity, make_grid
from lfm_jax.models import Cond, create_model, init_params

SHAPE = (4, 4, 2)


@pytest.fixture(scope="module")
def network():
    """A small DiT whose zero-initialised layers were moved: fresh ones answer 0."""
    model = create_model(
        "DiT", hidden=16, depth=1, heads=2, patch=2, num_classes=3, scan_blocks=False
    )
    params = init_params(model, jax.random.key(0), SHAPE)
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + jnp.asarray(0.05 * draw.normal(size=p.shape), p.dtype),
                          params)  # fmt: skip
    return model, params


def noise(count=4):
    return rng.normal(jax.random.split(jax.random.key(3), count), SHAPE)


def velocity_of(network):
    model, _ = network
    return lambda p: NetworkVelocity(
        params=p, model=model, cond=Cond(label=jnp.arange(4) % 3), t_max=1.0
    )


def by_hand(velocity, x, times, solver):
    """The same solve as a Python loop."""
    for t0, t1 in itertools.pairwise(times):
        now, later = (jnp.full(len(x), t) for t in (t0, t1))
        step = t1 - t0
        slope = velocity(x, now)
        if solver == "heun":
            slope = (slope + velocity(x + step * slope, later)) / 2
        if solver == "midpoint":
            slope = velocity(x + step / 2 * slope, (now + later) / 2)
        x = x + step * slope
    return x


@pytest.mark.parametrize(
    ("solver", "kept"), [("euler", 1), ("euler", 2), ("euler", 9), ("heun", 1), ("midpoint", 2)]
)
def test_value_and_gradient_are_those_of_a_plain_loop(network, solver, kept):
    make, times = velocity_of(network), make_grid("uniform", 3)

    def loss(params, x, solve):
        return jnp.square(solve(make(params), x)).mean()

    def ours(velocity, x):
        return mmd.generate(velocity, x, solver=solver, num_steps=3, kept=kept)[0]

    def loop(velocity, x):
        return by_hand(velocity, x, times, solver)

    found, wanted = (
        jax.jit(jax.value_and_grad(lambda p, x, s=s: loss(p, x, s), (0, 1)))(network[1], noise())
        for s in (ours, loop)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1e-3))


def test_truncated_gradient_is_that_of_the_last_step_alone(network):
    make, times = velocity_of(network), make_grid("uniform", 3)

    def ours(params):
        x, stats = mmd.generate(make(params), noise(), num_steps=3, backprop=1)
        assert stats["nfe"].shape == (4,)
        return jnp.square(x).mean()

    def loop(params):
        x = jax.lax.stop_gradient(by_hand(make(network[1]), noise(), times[:-1], "euler"))
        return jnp.square(by_hand(make(params), x, times[-2:], "euler")).mean()

    found, wanted = (jax.jit(jax.grad(f))(network[1]) for f in (ours, loop))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_memory_does_not_grow_with_the_number_of_steps_unless_they_are_kept(network):
    """At a batch whose activations outweigh the parameters."""
    model, params = network
    x = jnp.zeros((64, 8, 8, 2))

    def loss(params, steps, kept):
        velocity = NetworkVelocity(params=params, model=model, cond=Cond(label=jnp.arange(64) % 3))
        return jnp.square(mmd.generate(velocity, x, num_steps=steps, kept=kept)[0]).mean()

    def peak(steps, kept=1):
        gradient = jax.jit(jax.grad(lambda p: loss(p, steps, kept)))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak(8) <= 1.15 * peak(1) + 8 * x.nbytes + parameters
    assert peak(4, kept=4) > 2 * peak(4)


def test_ddim_without_noise_is_euler_and_with_noise_is_its_own(network):
    make = velocity_of(network)
    euler = by_hand(make(network[1]), noise(), make_grid("uniform", 3), "euler")

    def loss(params, eta):
        x, _ = mmd.generate(make(params), noise(), num_steps=3, solver="ddim", eta=eta)
        return jnp.square(x).mean(), x

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, plain), _ = run(network[1], 0.0)
    np.testing.assert_allclose(plain, euler, atol=1e-5)
    (_, noisy), gradient = run(network[1], 1.0)
    assert np.abs(noisy - euler).max() > 1e-2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_trained_solver_starts_as_its_grid_and_learns_a_better_one():
    """One number a step: after a few updates two Euler steps of a curved flow land closer."""
    velocity = Gaussian(mean=jnp.float32(1.0), std=jnp.float32(0.2))
    x = jax.random.normal(jax.random.key(0), (64, 1))
    start = mmd.new_solver(make_grid("uniform", 2))

    def land(trained):
        return mmd.generate(velocity, x, num_steps=2, trained_solver=trained)[0]

    np.testing.assert_allclose(land(start), mmd.generate(velocity, x, num_steps=2)[0], atol=1e-6)

    def loss(trained):
        return jnp.square(land(trained) - velocity.solution(x)).mean()

    step = jax.jit(lambda s: jax.tree.map(lambda p, g: p - 0.3 * g, s, jax.grad(loss)(s)))
    trained = start
    for _ in range(100):
        trained = step(trained)
    assert loss(trained) < 0.6 * loss(start)
    times = mmd.solver_times(trained, 2)
    assert 0 < times[0] <= 1 and times[-1] == 0 and (np.diff(times) < 0).all()


def test_a_trained_grid_stays_within_the_flow_and_can_leave_its_ends():
    solver = mmd.new_solver(np.array([1.0, 0.0]))
    for start, expected in ((1.0, 1.0), (1.2, 0.8), (0.7, 0.7), (0.0, 0.05)):
        times = mmd.solver_times({**solver, "start": jnp.float32(start)}, 1)
        np.testing.assert_allclose(times, [expected, 0.0], rtol=1e-6)
    slope = jax.grad(lambda s: mmd.solver_times({**solver, "start": s}, 1)[0])
    assert slope(1.0) == 1 and slope(1.1) == -1


@pytest.mark.parametrize("kind", mmd.TRAINABLE)
def test_every_trainable_tree_starts_as_the_network_and_moves_only_its_part(network, kind):
    model, params = network
    tree = mmd.trainable(kind, params, jax.random.key(0), rank=2, times=make_grid("uniform", 2))
    mask = mmd.trained_mask(kind, tree)

    def samples(tree):
        plain, trained = mmd.deploy(mmd.freeze(tree, mask))
        velocity = velocity_of((model, plain))(plain)
        return mmd.generate(velocity, noise(), num_steps=2, trained_solver=trained)[0]

    wanted = by_hand(velocity_of(network)(params), noise(), make_grid("uniform", 2), "euler")

    def loss(tree):
        x = samples(tree)
        return jnp.square(x).mean(), x

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for (path, value), moves in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(mask), strict=True
    ):
        if not moves:
            assert not np.any(value), path
    moved = [g for g, m in zip(jax.tree.leaves(gradient), jax.tree.leaves(mask), strict=True) if m]
    assert moved and any(np.any(g) for g in moved)
    if kind == "solver":
        assert sum(g.size for g in moved) < 100
    if kind == "lora":
        assert sum(g.size for g in moved) < sum(p.size for p in jax.tree.leaves(params)) / 2


def test_a_steered_network_answers_differently_for_each_number_of_steps(network):
    _, params = network
    tree = mmd.trainable("all", params, jax.random.key(0), several_steps=True, several_scales=True)
    same = mmd.deploy(tree, num_steps=4)[0]
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    offset = tree[mmd.FEW_STEP]["offset"]
    tree[mmd.FEW_STEP]["offset"] = {**offset, "out": offset["out"] + 0.1}
    one, four = (mmd.deploy(tree, num_steps=n)[0]["time_out"]["bias"] for n in (1, 4))
    assert np.abs(one - four).max() > 1e-3
    _, _, left = mmd.deploy_sampler(tree, num_steps=1, guidance=2.0)
    assert left == 1


def test_a_network_that_is_told_the_steps_alone_leaves_the_scale_to_the_sampler(network):
    _, params = network
    tree = mmd.trainable("all", params, jax.random.key(0), several_steps=True)
    offset = tree[mmd.FEW_STEP]["offset"]
    tree[mmd.FEW_STEP]["offset"] = {**offset, "out": offset["out"] + 0.1}

    def bias(steps, scale):
        plain, _, left = mmd.deploy_sampler(tree, num_steps=steps, guidance=scale)
        assert left == scale
        return plain["time_out"]["bias"]

    np.testing.assert_array_equal(bias(2, 1.5), bias(2, 1.0))
    assert np.abs(bias(2, 1.0) - bias(4, 1.0)).max() > 1e-3
    told = mmd.trainable("all", params, jax.random.key(0), several_scales=True)
    assert mmd.deploy_sampler(told, num_steps=2, guidance=1.5)[2] == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: mmd.generate(v, noise(), num_steps=0), "0 is below 1"),
        (lambda v: mmd.generate(v, noise(), num_steps=2, solver="best"), "none of euler"),
        (
            lambda v: mmd.generate(
                v, noise(), num_steps=3, trained_solver=mmd.new_solver(make_grid("uniform", 2))
            ),
            "grid has 2 steps",
        ),
        (lambda v: mmd.generate(v, noise(), num_steps=3, solver="ddim", backprop=1), "ddim"),
        (lambda v: mmd.trainable("some", {}, jax.random.key(0)), "none of all"),
        (lambda v: mmd.trained_mask("adaln", {"a": jnp.ones(1)}), "nothing to train"),
        (lambda v: mmd.trainable("all", {}, jax.random.key(0), several_steps=True), "time_out"),
    ],
)
def test_mistakes_are_told_in_one_line(network, call, words):
    with pytest.raises(UserError, match=words):
        call(velocity_of(network)(network[1]))
