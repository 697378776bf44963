"""The loss: spaces, labels, banks, gradcache, guidance in the target, and the 2-D toy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.mmd_toy import finetune, target_rows, untuned
from lfm_jax import mmd
from lfm_jax.errors import UserError
from lfm_jax.models import DiT

KEY = jax.random.key(0)


def rows(count, dim=4, seed=0, shift=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(shift, 1, (count, dim)), jnp.float32)


def batch_of(count, classes=3):
    return {
        "position": jnp.arange(count, dtype=jnp.uint32) + 8,
        "label": jnp.arange(count) % classes,
    }


def linear_generator(params, batch, key):
    """One row a position: its own noise times a matrix."""
    keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(batch["position"])
    z = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys)
    return {"a": jnp.tanh(z @ params["w"]), "b": jnp.sin(z @ params["w"])}, batch["label"]


def spaces(joint=2.0, classes=3):
    made = {}
    for i, name in enumerate(("a", "b")):
        made[name] = mmd.make_space(
            rows(200, seed=i), factors=(0.5, 1), joint=joint, num_classes=classes, weight=1 + i
        )
    return made


def bank(classes=3, count=90):
    values = {"a": np.asarray(rows(count, seed=5)), "b": np.asarray(rows(count, seed=6))}
    return mmd.make_bank(values, np.arange(count)[::-1] % classes, num_classes=classes)


PARAMS = {"w": jnp.asarray(np.random.default_rng(9).normal(size=(4, 4)), jnp.float32)}


def test_gradcache_is_the_whole_gradient():
    def gradient(**options):
        loss = mmd.mmd_loss(linear_generator, spaces(), bank=bank(), bank_rows=30, **options)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, batch_of(12), KEY)

    (value, metrics), whole = gradient()
    for chunks in (2, 6, 12):
        (found, _), parts = gradient(chunks=chunks)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        error = np.linalg.norm(parts["w"] - whole["w"]) / np.linalg.norm(whole["w"])
        assert error < 2e-6, chunks
    assert {"spread/a", "spread/b"} <= set(metrics)


def test_backward_through_some_chunks_is_right_on_average():
    landmarks = {
        name: space.replace(
            attraction=mmd.mean_row(space.rows(rows(50, seed=7), jnp.zeros(50, int)))
        )
        for name, space in spaces().items()
    }

    def one(start, backward):
        batch = {**batch_of(8), "position": jnp.arange(8, dtype=jnp.uint32) + start}
        loss = mmd.mmd_loss(linear_generator, landmarks, chunks=4, backward_chunks=backward)
        return jax.grad(loss, has_aux=True)(PARAMS, batch, KEY)[0]["w"]

    starts = jnp.arange(300, dtype=jnp.uint32) * 8
    some, whole = (jax.jit(jax.vmap(lambda s, b=b: one(s, b)))(starts) for b in (1, 0))
    difference = some - whole
    error = difference.std(0) / np.sqrt(len(starts))
    assert (np.abs(difference.mean(0)) < 4 * error + 1e-7).all()
    assert np.abs(difference).max() > 1e-5


@pytest.mark.parametrize("name", ["linear", "cubic", "gaussian", "laplace", "imq"])
def test_large_joint_compares_within_classes_only(name):
    """Pairs of two classes count for nothing; a heavy tail sees them from further away."""
    joint = 1e7 if name == "imq" else 50.0
    space = mmd.make_space(rows(200), kernel=name, joint=joint, num_classes=3)
    x, labels = rows(30, seed=1), jnp.arange(30) % 3
    y, real_labels = rows(60, seed=2, shift=0.3), jnp.arange(60) % 3
    value, _ = mmd.discrepancy({"a": space}, {"a": x}, labels, {"a": y}, real_labels,
                               estimator="biased")  # fmt: skip
    plain, kernel = space.replace(num_classes=0), space.kernel.kernel
    wanted = 0.0
    for label in range(3):
        a, b = plain.rows(x[labels == label], None), plain.rows(y[real_labels == label], None)
        wanted += mmd.within(a, kernel, estimator="biased") / 9
        wanted -= 2 * mmd.mean_pairs(a, b, kernel) / 9
    np.testing.assert_allclose(value, wanted, rtol=1e-5)  # without the real side's constant


def test_marginals_do_not_see_labels_and_the_joint_kernel_does():
    """Right images under the wrong labels."""
    x = jnp.concatenate([rows(60, shift=2.0), rows(60, seed=1, shift=-2.0)])
    labels = jnp.repeat(jnp.arange(2), 60)
    y = jnp.concatenate([rows(60, seed=2, shift=2.0), rows(60, seed=3, shift=-2.0)])

    def value(joint, given):
        space = mmd.make_space(y, joint=joint, num_classes=2)
        _, metrics = mmd.discrepancy({"a": space}, {"a": x}, given, {"a": y}, labels)
        return float(metrics["mmd2/a"])

    assert abs(value(0.0, 1 - labels) - value(0.0, labels)) < 1e-6
    assert value(4.0, 1 - labels) > 0.1 > value(4.0, labels) + 0.05


def test_guidance_in_the_target_moves_away_from_the_mean_of_all_classes():
    """Two classes at -1 and +1 with overlap: the optimum for class 1 moves outward with a."""
    draw = np.random.default_rng(0)
    labels = np.arange(2000) % 2
    real = (draw.normal(size=(2000, 1)) + 2.0 * labels[:, None] - 1).astype(np.float32)
    data = mmd.make_bank({"a": real}, labels, num_classes=2)
    space = mmd.make_space(data.rows["a"], joint=8.0, num_classes=2)

    def generator(params, batch, key):
        keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(batch["position"])
        z = jax.vmap(lambda k: jax.random.normal(k, (1,)))(keys)
        return {"a": 0.8 * z + params[batch["label"]][:, None]}, batch["label"]

    found = {}
    for scale in (1.0, 1.6):
        loss = mmd.mmd_loss(generator, {"a": space}, bank=data, bank_rows=2000, guidance=(scale,))
        tx = optax.adam(0.05)

        @jax.jit
        def step(params, state, start, loss=loss, tx=tx):
            batch = {"position": start + jnp.arange(128, dtype=jnp.uint32),
                     "label": jnp.arange(128) % 2}  # fmt: skip
            gradient, _ = jax.grad(loss, has_aux=True)(params, batch, KEY)
            updates, state = tx.update(gradient, state)
            return optax.apply_updates(params, updates), state

        params = jnp.zeros(2)
        state = tx.init(params)
        for i in range(120):
            params, state = step(params, state, jnp.uint32(128 * i))
        found[scale] = params
    np.testing.assert_allclose(found[1.0], [-1, 1], atol=0.25)
    assert found[1.6][1] > found[1.0][1] + 0.15 and found[1.6][0] < found[1.0][0] - 0.15


def test_a_bank_survives_its_file_and_refuses_another_makers(tmp_path):
    path, made = tmp_path / "bank.npz", bank()
    assert mmd.load_bank(path, {"seed": 1}) is None
    mmd.save_bank(path, made, {"seed": 1})
    found = mmd.load_bank(path, {"seed": 1})
    np.testing.assert_allclose(found.rows["a"], made.rows["a"], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.labels, made.labels)
    assert (np.diff(found.labels) >= 0).all() and found.starts == (0, 30, 60, 90)
    assert mmd.load_bank(path, {"seed": 2}) is None
    content = bytearray(path.read_bytes())
    at = content.index(b"a.npy") + 400
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checksum differs|not readable"):
        mmd.load_bank(path, {"seed": 1})


def test_draws_are_fresh_keep_the_classes_shares_and_follow_groups():
    made = bank()
    one, labels = made.draw(jax.random.key(1), 30)
    other, _ = made.draw(jax.random.key(2), 30)
    assert np.abs(one["a"] - other["a"]).max() > 0
    np.testing.assert_array_equal(np.bincount(labels), [10, 10, 10])
    _, labels = made.draw(jax.random.key(1), 30, jnp.array([2, 0]))
    np.testing.assert_array_equal(labels, [2] * 15 + [0] * 15)


def test_groups_relabel_the_generated_side():
    seen = []

    def generator(params, batch, key):
        seen.append(batch["label"])
        return linear_generator(params, batch, key)

    loss = mmd.mmd_loss(generator, spaces(), bank=bank(), bank_rows=30, groups=2)
    loss(PARAMS, batch_of(12), KEY)
    counts = np.bincount(seen[0], minlength=3)
    assert sorted(counts) == [0, 6, 6]


def test_pairs_of_dealt_classes_count_as_in_free_draws():
    """For a linear kernel E k(x, x') of rows at their class means is k of the mean and itself."""
    means = rows(3, seed=3)
    kernel = mmd.make_kernel("linear")
    mean = means.mean(0, keepdims=True)
    wanted = float(kernel(mean, mean)[0, 0])
    labels = jnp.array([4, 7, 9])[jnp.array([1, 0, 2, 2, 1, 0])]
    x = means[jnp.array([1, 0, 2, 2, 1, 0])]

    def found(block=0, **options):
        return jax.jit(lambda x: mmd.within(x, kernel, block=block, **options))(x)

    assert found(strata=labels, num_strata=3) == pytest.approx(wanted, rel=1e-5)
    assert found(strata=labels, num_strata=3, block=4) == pytest.approx(wanted, rel=1e-5)
    assert found() != pytest.approx(wanted, rel=1e-2)
    one = {"strata": jnp.full(6, 5), "num_strata": 1}
    assert found(**one) == pytest.approx(float(found()), rel=1e-5)


def test_groups_keep_the_spread_of_a_class():
    """Classes of standard deviation 1: two samples a class are as wide as 128 free draws."""
    draw = np.random.default_rng(0)
    labels = np.arange(1200) % 4
    real = (draw.normal(size=(1200, 1)) + labels[:, None]).astype(np.float32)
    data = mmd.make_bank({"a": real}, labels, num_classes=4)
    space = mmd.make_space(data.rows["a"], kernel="energy", joint=16.0, num_classes=4)

    def generator(params, batch, key):
        keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(batch["position"])
        z = jax.vmap(lambda k: jax.random.normal(k, (1,)))(keys)
        return {"a": params * z + batch["label"][:, None]}, batch["label"]

    loss = mmd.mmd_loss(generator, {"a": space}, bank=data, bank_rows=1200, groups=4)

    @jax.jit
    def slope(width):
        def one(start):
            batch = {"position": start + jnp.arange(8, dtype=jnp.uint32), "label": jnp.zeros(8)}
            return jax.grad(lambda w: loss(w, batch, KEY)[0])(width)

        return jax.vmap(one)(8 * jnp.arange(4000, dtype=jnp.uint32)).mean()

    assert slope(0.9) < -0.005 and slope(1.1) > 0.005


def test_far_labels_cost_the_features_no_digits():
    """The energy kernel's gradient against float64, classes a thousand medians apart."""
    space = mmd.make_space(rows(200), kernel="energy", joint=1000.0, num_classes=2)
    x, y, labels = rows(40, seed=1), rows(60, seed=2, shift=0.3), jnp.arange(40) % 2

    def value(x):
        return mmd.discrepancy({"a": space}, {"a": x}, labels, {"a": y}, jnp.arange(60) % 2)[0]

    def wanted():
        scale = np.asarray(space.scale, np.float64)
        a, b = (np.asarray(v, np.float64) / scale for v in (x, y))
        far = 2 * float(space.label_scale) ** 2
        gradient = np.zeros_like(a)
        for i in range(40):
            for others, count, sign, of in ((a, 40 * 39, -1, labels), (b, 40 * 60, 1, None)):
                told = np.asarray(of if of is not None else np.arange(60) % 2)
                apart = a[i] - others
                length = np.sqrt((apart**2).sum(1) + far * (told != int(labels[i])))
                length[length == 0] = np.inf
                gradient[i] += sign * 2 * (apart / length[:, None]).sum(0) / count
        return gradient / scale

    error = np.abs(np.asarray(jax.grad(value)(x)) - wanted()).max()
    assert error < 1e-5 * np.abs(wanted()).max()


def test_bandwidths_are_those_of_all_classes():
    """Real rows come sorted by class: the first ones are of one."""
    y = jnp.concatenate([rows(2500, seed=1), rows(2500, seed=2, shift=20.0)])
    apart = mmd.median_bandwidth(y)
    assert mmd.median_bandwidth(y[::-1]) == pytest.approx(float(apart), rel=0.1)
    assert apart > 10


def test_spread_sees_a_collapse_beside_far_labels():
    space = mmd.make_space(rows(200), kernel="energy", joint=64.0, num_classes=2)
    labels = jnp.arange(40) % 2
    _, found = mmd.discrepancy({"a": space}, {"a": jnp.ones((40, 4))}, labels,
                               {"a": rows(60)}, jnp.arange(60) % 2)  # fmt: skip
    assert found["spread/a"] < 0.01


def test_anchor_and_real_side_in_chunks_are_the_whole():
    """And the anchor keeps the examples' own labels where classes are dealt out."""
    seen = []

    def anchor(params, batch, key):
        seen.append(batch["label"])
        return jnp.square(batch["position"][:, None] * params["w"].sum(0)).mean(), {}

    def real(batch, key):
        y = jnp.sin(batch["position"][:, None] * jnp.arange(1.0, 5))
        return {"a": y, "b": y}, batch["label"]

    def gradient(**options):
        loss = mmd.mmd_loss(linear_generator, spaces(), anchor=anchor, anchor_weight=0.1, **options)
        return jax.grad(loss, has_aux=True)(PARAMS, batch_of(12), KEY)[0]["w"]

    np.testing.assert_allclose(gradient(real=real, chunks=4), gradient(real=real), rtol=2e-5)
    seen.clear()
    gradient(bank=bank(), bank_rows=30, groups=2)
    np.testing.assert_array_equal(seen[0], batch_of(12)["label"])


def test_nystrom_of_repeated_rows_under_the_energy_kernel():
    """Its gram has no trace, and equal centres make it singular."""
    y, x = jnp.tile(rows(100, dim=3), (3, 1)), rows(50, dim=3, seed=1, shift=0.5)
    few = mmd.nystrom(y, mmd.Energy(), 60, KEY)
    wanted = mmd.mean_pairs(x, y, mmd.Energy())
    np.testing.assert_allclose(few.mean_pairs(x, mmd.Energy()), wanted, rtol=5e-3)


def test_the_mean_of_each_class_is_all_that_a_linear_kernel_needs():
    y, labels = rows(90, seed=1), jnp.repeat(jnp.arange(3), 30)
    space = mmd.make_space(y, kernel="linear", joint=2.0, num_classes=3)
    whole, (x, told) = space.rows(y, labels), (rows(20, seed=2), jnp.arange(20) % 3)
    x = space.rows(x, told)
    np.testing.assert_allclose(
        mmd.mean_row(whole, labels).mean_pairs(x, space.kernel),
        mmd.mean_pairs(x, whole, space.kernel),
        rtol=1e-5,
    )


def test_nystrom_and_the_mean_stand_for_all_real_rows():
    y, x = rows(600, dim=3), rows(50, dim=3, seed=1, shift=0.5)
    kernel = mmd.Gaussian(bandwidth=2.0)
    wanted = mmd.mean_pairs(x, y, kernel)
    few = mmd.nystrom(y, kernel, 40, KEY)
    np.testing.assert_allclose(few.mean_pairs(x, kernel), wanted, rtol=2e-3)
    linear = mmd.make_kernel("linear")
    np.testing.assert_allclose(
        mmd.mean_row(y).mean_pairs(x, linear), mmd.mean_pairs(x, y, linear), rtol=1e-5
    )


def test_soft_clamp_is_a_clip_that_keeps_a_slope():
    x = jnp.array([-3.0, -1.0, 0.5, 2.0])
    np.testing.assert_array_equal(mmd.soft_clamp(x), jnp.clip(x, -1, 1))
    slope = jax.grad(lambda x: mmd.soft_clamp(x).sum())(x)
    assert slope[2] == 1 and 0 < slope[0] < 1 and slope[3] == slope[0]


def test_two_euler_steps_of_a_curved_flow_recover_the_target():
    """A network whose exact flow is curved: two steps miss, after finetuning they do not."""
    target = target_rows(2000)
    kernel = mmd.Gaussian(bandwidth=0.5)

    def distance(points):
        return float(mmd.mmd2(jnp.asarray(points), jnp.asarray(target), kernel))

    before, after = distance(untuned(2000)), distance(finetune(steps=1000, batch=256))
    floor = abs(distance(target_rows(2000, seed=5)))
    assert after < before / 12 and floor < 0.002


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mmd.mmd_loss(linear_generator, spaces(), groups=2), "feature bank"),
        (
            lambda: mmd.mmd_loss(linear_generator, spaces(), bank=bank(), groups=3)(
                PARAMS, batch_of(5), KEY
            ),
            "at most 2, so that two",
        ),
        (lambda: mmd.mmd_loss(linear_generator, spaces(), bank=bank(), groups=4), "a bank of 3"),
        (
            lambda: mmd.mmd_loss(linear_generator, spaces(), bank=bank(), estimator="linear")(
                PARAMS, batch_of(12), KEY
            ),
            "expected unbiased or biased",
        ),
        (lambda: mmd.mmd_loss(linear_generator, spaces(), guidance=(0.5,)), "at least 1"),
        (
            lambda: mmd.mmd_loss(linear_generator, spaces(), bank=bank(), chunks=5)(
                PARAMS, batch_of(12), KEY
            ),
            "no divisor",
        ),
        (
            lambda: mmd.mmd_loss(linear_generator, spaces())(PARAMS, batch_of(12), KEY),
            "neither real rows",
        ),
        (
            lambda: mmd.make_bank({"a": np.full((2, 2), np.nan)}, np.zeros(2, int)),
            "not finite on real data",
        ),
        (
            lambda: mmd.make_bank({"a": np.ones((2, 2))}, np.zeros(2, int), num_classes=2),
            "no example of class 1",
        ),
        (lambda: mmd.nystrom(rows(5), mmd.Gaussian(bandwidth=1.0), 9, KEY), "9 landmarks"),
        (
            lambda: mmd.row_generator(DiT(), [mmd.RawLatents()], (4, 4, 2), steps=(0,)),
            "at least 1",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(call, words):
    with pytest.raises(UserError, match=words):
        call()
