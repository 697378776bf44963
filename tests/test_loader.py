"""The stream is a pure function of seed and position; prefetch changes nothing but the time."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from lfm_jax.data import CacheWriter, image_batches, latent_batches, open_images, prefetch
from lfm_jax.errors import UserError

COUNT = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    writer = CacheWriter(
        tmp_path_factory.mktemp("cache") / "train",
        num_examples=COUNT,
        shard_size=25,
        latent_shape=(2, 2, 2),
        metadata={"encoder": "e", "scale": 1.0, "shift": 0.0, "image_size": 4},
    )
    for shard in writer.missing_shards():
        writer.write_shard(
            shard,
            ({"moments": np.full((2, 2, 4), i), "label": i % 7} for i in writer.shard_range(shard)),
        )
    return writer.finish()


def take(iterator, steps):
    return list(itertools.islice(iterator, steps))


def joined(batches, name="index"):
    return np.concatenate([batch[name] for batch in batches])


def test_an_epoch_holds_every_example_once_and_the_next_is_another_permutation(cache):
    # 60 examples in batches of 32: the second batch crosses the border.
    drawn = joined(take(latent_batches(cache, global_batch=32, seed=1), 6))
    epochs = drawn[:180].reshape(3, COUNT)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_rows_belong_together(cache):
    for batch in take(latent_batches(cache, global_batch=32, seed=1), 3):
        np.testing.assert_array_equal(batch["moments"][:, 0, 0, 0].astype(int), batch["index"])
        np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
        assert batch["moments"].dtype == np.float16 and batch["moments"].shape == (32, 2, 2, 4)
        assert batch["label"].dtype == batch["index"].dtype == np.int32
        assert batch["position"].dtype == np.uint32
    np.testing.assert_array_equal(batch["position"], np.arange(64, 96))


def test_seeds_differ_and_even_neighbouring_ones_share_no_epoch(cache):
    first = joined(take(latent_batches(cache, global_batch=COUNT, seed=1), 3)).reshape(3, COUNT)
    again = joined(take(latent_batches(cache, global_batch=COUNT, seed=1), 3)).reshape(3, COUNT)
    other = joined(take(latent_batches(cache, global_batch=COUNT, seed=2), 3)).reshape(3, COUNT)
    np.testing.assert_array_equal(first, again)
    assert all((a != b).any() for a in first for b in other)


@pytest.mark.parametrize("in_memory", [False, True])
def test_start_continues_the_stream(cache, in_memory):
    whole = take(latent_batches(cache, global_batch=16, seed=5), 12)
    tail = take(
        latent_batches(cache, global_batch=16, seed=5, start=7 * 16, in_memory=in_memory), 5
    )
    for one, two in zip(whole[7:], tail, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_process_count_continues_the_stream(cache, processes):
    """Changed after 3 steps: by position, the same examples come next."""
    whole = take(latent_batches(cache, global_batch=16, seed=5), 8)
    wanted = dict(zip(joined(whole, "position"), joined(whole), strict=True))
    found = {}
    for process in range(processes):
        share = take(
            latent_batches(
                cache,
                global_batch=16,
                seed=5,
                start=48,
                process_index=process,
                process_count=processes,
            ),
            5,
        )
        assert share[0]["label"].shape == (16 // processes,)
        # Step by step each process stays within the step's own 16 positions.
        for step, batch in enumerate(share):
            assert set(batch["position"]) <= set(range(48 + 16 * step, 64 + 16 * step))
        found |= dict(zip(joined(share, "position"), joined(share), strict=True))
    assert found == {place: wanted[place] for place in range(48, 128)}


def test_batches_that_processes_cannot_share(cache):
    with pytest.raises(UserError, match="batch_size=10: expected a multiple of the 4 processes"):
        latent_batches(cache, global_batch=10, seed=0, process_count=4)


def test_image_batches_keep_the_same_contract():
    source = open_images("digits", channels=1)
    batches = take(image_batches(source, global_batch=100, seed=0), 15)
    drawn = joined(batches)[: len(source)]
    np.testing.assert_array_equal(np.sort(drawn), np.arange(len(source)))
    batch = batches[3]
    assert batch["image"].shape == (100, 8, 8, 1) and batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image"], source.batch(batch["index"])["image"])
    np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])
    np.testing.assert_array_equal(batch["position"], np.arange(300, 400))
    later = next(image_batches(source, global_batch=100, seed=0, start=300))
    np.testing.assert_array_equal(later["index"], batch["index"])


def test_a_damaged_shard_reaches_the_caller(cache, tmp_path):
    def read(indices):
        raise UserError("latents-00001: damaged shard")

    from lfm_jax.data.loader import stream

    with pytest.raises(UserError, match="latents-00001: damaged shard"):
        next(stream(read, 10, global_batch=4, seed=0))


# ---- prefetch


def device_sharding():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def counting(steps, seen):
    for step in range(steps):
        seen.append(step)
        yield {"x": np.full((8, 3), step, np.float32), "position": np.arange(8, dtype=np.uint32)}


def test_prefetch_gives_the_same_batches_on_the_devices_and_ends():
    batches = list(prefetch(counting(5, []), device_sharding()))
    assert [int(batch["x"][0, 0]) for batch in batches] == list(range(5))
    assert batches[0]["x"].sharding == device_sharding()
    assert batches[0]["position"].dtype == np.uint32
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetch_runs_ahead_by_its_depth_and_no_further():
    seen = []
    batches = prefetch(counting(100, seen), device_sharding(), depth=3)
    next(batches)
    deadline = time.time() + 5
    while len(seen) < 5 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(seen) == 5  # one taken, three waiting, one in hand
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetch_raises_what_the_iterator_raised_in_its_place():
    def failing():
        yield from counting(2, [])
        raise UserError("shard 3: damaged")

    batches = prefetch(failing(), device_sharding())
    assert int(next(batches)["x"][0, 0]) == 0
    assert int(next(batches)["x"][0, 0]) == 1
    with pytest.raises(UserError, match="shard 3: damaged"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
