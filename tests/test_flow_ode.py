"""Solvers: order, counts, exact ends, error control, what they do with numbers that are not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import Calls, Counting, Gaussian, Tangent

from lfm_jax.errors import UserError
from lfm_jax.flow import (
    GRIDS,
    SOLVERS,
    describe_failure,
    invert,
    make_grid,
    sample,
    trajectory,
)

# Fine enough for the leading error to lead, coarse enough to stay above rounding.
ORDER_STEPS = {1: (64, 128), 2: (128, 256), 3: (32, 64), 4: (32, 64), 5: (20, 40), 8: (10, 20)}
NOISE = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
GAUSSIAN = Gaussian(mean=jnp.asarray(0.3), std=jnp.asarray(0.5))


def rms(x):
    return jnp.sqrt(jnp.mean(x**2))


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence_on_a_non_linear_flow(solver):
    order = SOLVERS[solver].order
    steps = ORDER_STEPS[order]
    if solver == "exp2":  # of order h^2 log(1/h): the logarithm fades slowly
        steps = (1024, 2048)
    with jax.enable_x64(True):
        x1 = jnp.linspace(-0.6, 0.8, 64).reshape(8, 8)
        velocity = Tangent(w=jnp.asarray(2.5))
        exact = velocity.solution(x1)
        errors = [
            float(rms(sample(velocity, x1, solver=solver, num_steps=n)[0] - exact)) for n in steps
        ]
    measured = np.log2(errors[0] / errors[1])
    assert order - 0.35 < measured < order + 0.8, (solver, errors)


@pytest.mark.parametrize("solver", SOLVERS)
def test_counts_are_the_calls_that_were_executed(solver):
    calls = Calls()
    widths = jnp.asarray([0.02, 0.5, 1.0]).reshape(3, 1, 1, 1)  # the narrower, the more steps
    velocity = Counting(inner=Gaussian(mean=jnp.asarray(0.3), std=widths), calls=calls)
    _, stats = sample(velocity, NOISE, solver=solver, num_steps=5)
    assert calls.take() == int(stats["network_calls"]) == int(stats["nfe"][0])
    assert int(stats["steps"][0]) == 5
    if not SOLVERS[solver].adaptive:
        return
    for norm in ("sample", "batch"):
        _, stats = sample(velocity, NOISE, solver=solver, rtol=1e-3, atol=1e-3, error_norm=norm)
        assert calls.take() == int(stats["network_calls"]) == int(stats["nfe"].max())
        assert (len(set(stats["nfe"].tolist())) > 1) == (norm == "sample")


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_fall_from_t_max_to_exactly_zero(grid):
    for t_max in (1.0, 0.9937):
        times = make_grid(grid, 7, t_max=t_max)
        assert len(times) == 8
        assert times[0] == np.float32(t_max) and times[-1] == 0.0
        assert (np.diff(times) < 0).all()


def test_a_list_of_times_is_walked_as_it_is():
    times = [1.0, 0.9, 0.3, 0.0]
    x, stats = sample(GAUSSIAN, NOISE, grid=times)
    by_hand = NOISE
    for t, s in itertools.pairwise(times):
        by_hand = by_hand + (s - t) * GAUSSIAN(by_hand, jnp.full((3,), t))
    np.testing.assert_allclose(x, by_hand, atol=1e-6)
    assert int(stats["nfe"][0]) == 3


def test_heun_is_the_explicit_trapezoid_rule_and_starts_at_t_max():
    velocity = GAUSSIAN.replace(t_max=0.9)
    t, s = jnp.full((3,), 0.9), jnp.zeros((3,))
    v = velocity(NOISE, t)
    by_hand = NOISE - 0.9 * (v + velocity(NOISE - 0.9 * v, s)) / 2
    x, stats = sample(velocity, NOISE, solver="heun", num_steps=1)
    np.testing.assert_allclose(x, by_hand, atol=1e-6)
    assert int(stats["nfe"][0]) == 2


@pytest.mark.parametrize("solver", ["bosh3", "tsit5", "dopri5", "dopri8"])
def test_adaptive_error_follows_the_tolerance(solver):
    exact = GAUSSIAN.solution(NOISE)
    coarse, few = sample(GAUSSIAN, NOISE, solver=solver, rtol=1e-2, atol=1e-2)
    fine, many = sample(GAUSSIAN, NOISE, solver=solver, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(fine - exact).max()) < 5e-4
    assert float(jnp.abs(coarse - exact).max()) < 0.1
    assert (many["nfe"] > few["nfe"]).all()


def test_per_sample_error_control_does_not_see_the_batch():
    noise = NOISE.at[2].mul(50.0)
    options = {"solver": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    together, stats = sample(GAUSSIAN, noise, **options)
    alone, own = sample(GAUSSIAN, noise[:1], **options)
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)
    assert int(stats["nfe"][0]) == int(own["nfe"][0])
    joint, _ = sample(GAUSSIAN, noise, error_norm="batch", **options)
    assert float(jnp.abs(joint[:1] - alone).max()) > 0  # the option for parity does see it


def test_first_step_follows_the_velocity_and_not_the_direction_of_time():
    def steps(std):
        velocity = Gaussian(mean=jnp.asarray(0.3), std=jnp.asarray(std))
        options = {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3}
        return [int(f(velocity, NOISE, **options)[1]["steps"].max()) for f in (sample, invert)]

    # From a first step of 0.01, ten times longer each time, even a straight flow took three.
    assert max(steps(1.0)) <= 3 < max(steps(0.02))


def test_gradient_through_an_adaptive_solve_is_finite_and_right():
    def end(std, differentiable):
        velocity = Gaussian(mean=jnp.asarray(0.3), std=std)
        options = {"solver": "bosh3", "rtol": 1e-4, "error_norm": "batch"}
        x, _ = sample(velocity, NOISE, differentiable=differentiable, **options)
        return jnp.mean(x**2)

    std, h = jnp.asarray(0.5), 2e-2
    difference = (end(std + h, False) - end(std - h, False)) / (2 * h)
    assert float(jax.grad(end)(std, True)) == pytest.approx(float(difference), rel=2e-2)


def test_other_parameters_do_not_compile_again():
    traces = []

    @jax.jit
    def program(velocity, noise):
        traces.append(1)
        return sample(velocity, noise, solver="heun", num_steps=4)[0]

    first = program(GAUSSIAN, NOISE)
    second = program(Gaussian(mean=jnp.asarray(1.0), std=jnp.asarray(2.0)), NOISE)
    assert len(traces) == 1
    assert float(jnp.abs(first - second).max()) > 0.1


@pytest.mark.parametrize("steps", ["fixed", "differentiated", "adaptive"])
def test_no_solve_calls_back_into_python(steps):
    """A program that does is kept in no compilation cache."""

    def end(noise):
        if steps == "adaptive":
            return sample(GAUSSIAN, noise, solver="dopri5", rtol=1e-3, atol=1e-3)[0].sum()
        differentiated = steps == "differentiated"
        return sample(GAUSSIAN, noise, num_steps=4, differentiable=differentiated)[0].sum()

    program = jax.grad(end) if steps == "differentiated" else end
    assert "callback" not in jax.jit(program).lower(NOISE).as_text()


@pytest.mark.parametrize("solver", ["euler", "ab2", "exp2", "heun", "rk4", "dopri5"])
def test_gradient_through_the_solve_is_that_of_a_loop_by_hand(solver):
    def end(std, differentiable):
        velocity = Gaussian(mean=jnp.asarray(0.3), std=std)
        x, _ = sample(velocity, NOISE, solver=solver, num_steps=6, differentiable=differentiable)
        return jnp.mean(x**2)

    std = jnp.asarray(0.5)
    gradient = jax.grad(end)(std, True)
    h = 1e-2
    difference = (end(std + h, False) - end(std - h, False)) / (2 * h)
    assert float(gradient) == pytest.approx(float(difference), rel=5e-3)


def test_a_sample_that_is_not_finite_is_named_with_its_time():
    velocity = Gaussian(mean=jnp.asarray([0.0, jnp.nan, 0.0]).reshape(3, 1, 1, 1), std=0.5)
    for options in ({"num_steps": 5}, {"solver": "dopri5", "rtol": 1e-3}):
        x, stats = sample(velocity, NOISE, **options)
        assert stats["finite"].tolist() == [True, False, True]
        assert bool(jnp.isfinite(x[::2]).all())
        line = describe_failure(stats, indices=[10, 11, 12])
        assert "1 of 3" in line and "sample 11" in line and "t = " in line
    assert float(sample(velocity, NOISE, num_steps=5)[1]["failed_t"][1]) == pytest.approx(0.8)
    assert describe_failure(sample(GAUSSIAN, NOISE)[1]) is None


def test_trajectory_ends_where_the_sample_does():
    track = trajectory(GAUSSIAN, NOISE, count=4, num_steps=9, solver="heun")
    x, _ = sample(GAUSSIAN, NOISE, num_steps=9, solver="heun")
    assert track["x"].shape == track["data"].shape == (4, *NOISE.shape)
    np.testing.assert_allclose(track["t"], [1, 2 / 3, 1 / 3, 0], atol=1e-6)
    np.testing.assert_array_equal(track["x"][0], NOISE)
    np.testing.assert_allclose(track["x"][-1], x, atol=1e-6)
    np.testing.assert_allclose(track["data"][-1], x, atol=1e-6)
    # At t = 1 nothing is known of the data but its mean.
    np.testing.assert_allclose(track["data"][0], jnp.full(NOISE.shape, 0.3), atol=1e-6)
    assert int(track["nfe"]) == 2 * 9 + 4


@pytest.mark.parametrize(
    "options, named",
    [
        ({"solver": "eular"}, "eular.*euler, ab2"),
        ({"solver": "rk4", "rtol": 1e-3}, "rk4 has no error estimate.*dopri5"),
        ({"grid": "log"}, "log.*uniform, shifted, quadratic, cosine"),
        ({"grid": [1.0, 0.5]}, "grid.*to 0"),
        ({"grid": [1.0, 0.5, 0.6, 0.0]}, "grid.*fall"),
        ({"num_steps": 0}, "num_steps: 0"),
        ({"solver": "dopri5", "rtol": 0.0}, "rtol: 0 "),
        ({"solver": "dopri5", "rtol": 1e-3, "atol": -1.0}, "atol: -1 "),
        ({"error_norm": "max"}, "max.*sample, batch"),
        ({"t_start": 1.5}, "within"),
        ({"solver": "dopri5", "rtol": 1e-3, "differentiable": True}, "sample has no derivatives"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        sample(GAUSSIAN, NOISE, **options)
