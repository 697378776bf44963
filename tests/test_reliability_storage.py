"""Damage to what was saved is named, and the newest whole checkpoint is used in its place."""

import logging
import os
import subprocess
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lfm_jax import checkpoints, checksums, sharding
from lfm_jax.data import CacheWriter, open_cache
from lfm_jax.errors import Failed, UserError
from lfm_jax.state import create_state

WIDTH = 40  # wide enough for an array's bytes to have a file of their own


def make_state(seed=0, width=WIDTH):
    def init():
        return {"layer": {"w": jax.random.normal(jax.random.key(seed), (width, width))}}

    return create_state(init, optax.adam(1e-3), sharding.make_mesh(), ema=True)


def save_steps(folder, steps=(1, 2), **options):
    """One state a step, all different."""
    states = {}
    with checkpoints.open_manager(folder, keep=9, **options) as manager:
        for step in steps:
            states[step] = make_state(step).replace(step=jnp.int32(step))
            data = {"examples_drawn": step}
            checkpoints.save(manager, step, states[step], data=data, config={"a": 1})
    return states


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def newest(folder):
    with checkpoints.open_manager(folder, keep=9) as manager:
        return checkpoints.newest_whole(manager, make_state())


def test_sums_see_every_bit_and_no_sharding():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, jnp.bfloat16, np.int32, np.uint8):
        array = np.asarray(rng.normal(size=(7, 3, 5)) * 9).astype(dtype)
        whole = checksums.host_sums({"a": array})
        assert checksums.sums({"a": jnp.asarray(array)}) == whole
        for _ in range(50):
            words = array.copy().reshape(-1).view(np.uint8)
            words[rng.integers(len(words))] ^= np.uint8(1 << rng.integers(8))
            flipped = words.view(array.dtype).reshape(array.shape)
            assert checksums.host_sums({"a": flipped}) != whole
    order, swapped = np.arange(6), np.array([0, 2, 1, 3, 4, 5])
    sums = [checksums.host_sums({"a": a.astype(np.int32)}) for a in (order, swapped)]
    assert sums[0] != sums[1]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0x10
    path.write_bytes(bytes(data))


def halve(path: Path, place: int) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path: Path, place: int) -> None:
    path.unlink()


KINDS = (flip, halve, remove)
ROTATIONS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_every_file_of_the_newest_step_may_be_damaged(tmp_path, rotation, caplog):
    """File by file: the older step is used and the damage named, or nothing was lost after all."""
    states = save_steps(tmp_path / "run")
    names = [p.relative_to(tmp_path / "run") for p in files_of(tmp_path / "run/2")]
    assert len(names) > 4
    fallen_back = 0
    for number, name in enumerate(names):
        folder = tmp_path / f"copy{number}"
        subprocess.run(["cp", "-r", tmp_path / "run", folder], check=True)
        KINDS[(number + rotation) % 3](folder / name, 97 * number + 31)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            step, state, data = newest(folder)
        chex.assert_trees_all_equal(state, states[step])
        assert data["examples_drawn"] == step
        if step == 1:
            fallen_back += 1
            assert str(folder / "2") in caplog.text and "damaged" in caplog.text
            assert files_of(folder / "damaged-2"), "the damaged step must not be deleted"
            assert checkpoints.latest_step(folder) == 1
    assert fallen_back >= 3


def test_parameters_of_a_damaged_step_are_refused(tmp_path):
    save_steps(tmp_path)
    for path in files_of(tmp_path / "2/state"):
        flip(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"2 is damaged.*run the job that wrote it again") as caught:
        checkpoints.load_params(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_whole_step_stops_in_one_line(tmp_path):
    save_steps(tmp_path)
    for step in (1, 2):
        remove(next(p for p in files_of(tmp_path / f"{step}/state")), 0)
        halve(next(p for p in files_of(tmp_path / f"{step}/data")), 0)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="none of 2 checkpoints is whole") as caught:
        newest(tmp_path)
    assert "\n" not in str(caught.value) and files_of(tmp_path) == before


def test_an_unfinished_step_is_not_taken_for_one(tmp_path):
    states = save_steps(tmp_path)
    (tmp_path / "3.orbax-checkpoint-tmp-7").mkdir()
    (tmp_path / "4").mkdir()  # what a copy that stopped leaves
    step, state, _ = newest(tmp_path)
    assert step == 2 and not (tmp_path / "3.orbax-checkpoint-tmp-7").exists()
    chex.assert_trees_all_equal(state, states[2])


def test_training_goes_on_over_the_damaged_step(tmp_path):
    """The step that was set aside is saved again under its number."""
    states = save_steps(tmp_path)
    halve(max(files_of(tmp_path / "2/state"), key=lambda p: p.stat().st_size), 0)
    with checkpoints.open_manager(tmp_path, keep=9) as manager:
        assert checkpoints.newest_whole(manager, make_state())[0] == 1
        assert checkpoints.save(manager, 2, states[2], data={}, config={})
    step, state, _ = newest(tmp_path)
    assert step == 2
    chex.assert_trees_all_equal(state, states[2])


def test_retention_keeps_the_latest_every_nth_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 6.0, 7: 7.0, 8: 8.0, 9: 9.0}
    options = {"keep": 2, "keep_every": 5, "keep_best": 2}
    for part in (range(1, 6), range(6, 10)):  # metrics must survive a restart
        with checkpoints.open_manager(tmp_path, **options) as manager:
            for step in part:
                metrics = {"loss": losses[step]}
                state = {"a": jnp.ones(3)}
                checkpoints.save(manager, step, state, data={}, config={}, metrics=metrics)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 5, 8, 9]


def test_an_export_that_was_killed_in_the_swap_loses_no_release(tmp_path):
    checkpoints.save_release(tmp_path, {"w": np.arange(3.0)}, {})
    (tmp_path / "0").rename(tmp_path / ".old")
    with pytest.raises(Failed):
        checkpoints.save_release(tmp_path, {"w": object()}, {})
    np.testing.assert_array_equal(checkpoints.load_release(tmp_path)["w"], np.arange(3.0))


def test_encoding_again_mends_what_was_damaged(tmp_path):
    """A flipped shard, a missing one, a damaged description, a damaged record of what was done."""

    def writer():
        return CacheWriter(
            tmp_path / "train",
            num_examples=8,
            shard_size=2,
            latent_shape=(2, 2, 1),
            metadata={"encoder": "e", "scale": 1.0, "shift": 0.0, "image_size": 8},
        )

    def write(shards):
        for shard in shards:
            rows = [{"moments": np.full((2, 2, 2), i)} for i in writer().shard_range(shard)]
            writer().write_shard(shard, rows)
        return writer().finish()

    whole = write(writer().missing_shards())
    shards = sorted((tmp_path / "train").glob("*array_record*"))
    flip(shards[0], shards[0].read_bytes().index(b"moments"))
    shards[1].unlink()
    flip(tmp_path / "train/metadata.json", 50)
    part = tmp_path / "train/parts/00002.json"
    part.write_text(part.read_text().replace('"count": 2', '"count": 3'))
    with pytest.raises(UserError, match="damaged"):
        open_cache(tmp_path / "train")
    missing = writer().missing_shards(verify=True)
    assert missing == [0, 1, 2]
    mended = write(missing)
    assert mended.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(mended.read(range(8))["moments"][7], np.full((2, 2, 2), 7))


@pytest.fixture
def small_disk(tmp_path):
    """A mounted tmpfs of 800 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", place]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_stops_the_run_and_keeps_the_good_steps(small_disk):
    states = {}
    with pytest.raises(Failed, match=r"save failed.*newest whole one is step") as caught:
        with checkpoints.open_manager(small_disk, keep=9) as manager:
            for step in range(1, 60):
                states[step] = make_state(step)
                checkpoints.save(manager, step, states[step], data={}, config={})
    assert "\n" not in str(caught.value)
    whole = checkpoints.latest_step(small_disk)
    chex.assert_trees_all_equal(
        checkpoints.load_params(small_disk), jax.device_get(states[whole].ema)
    )
    assert f"step {whole}" in str(caught.value)
    assert os.statvfs(small_disk).f_bavail < 60


def test_a_full_disk_deletes_nothing_to_make_room(small_disk):
    """With `keep=1` the one good step is deleted only when its successor is whole."""
    with checkpoints.open_manager(small_disk, keep=1) as manager:
        checkpoints.save(manager, 1, make_state(1), data={}, config={})
    with open(small_disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass
    with pytest.raises(Failed):
        with checkpoints.open_manager(small_disk, keep=1) as manager:
            checkpoints.save(manager, 2, make_state(2), data={}, config={})
    chex.assert_trees_all_equal(
        checkpoints.load_params(small_disk), jax.device_get(make_state(1).ema)
    )
