"""The cache: round trip, TFDS as the second reader, resume after a kill, every kind of damage."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_jax.data import CacheWriter, open_cache
from lfm_jax.data.latents import Feature, decode_record, encode_record
from lfm_jax.data.records import RecordError, encode_example, parse_example
from lfm_jax.errors import UserError

COUNT, SHAPE = 50, (4, 4, 4)
METADATA = {"encoder": "e" * 64, "scale": 0.5, "shift": 0.0, "image_size": 8, "num_classes": 300}


def moments(index: int) -> np.ndarray:
    return np.random.default_rng(index).normal(size=(4, 4, 8)).astype(np.float32)


def examples(indices):
    for i in indices:
        yield {"moments": moments(i), "moments_flip": moments(i)[:, ::-1], "label": 5 * i}


def make_writer(folder, **changes) -> CacheWriter:
    options = {
        "num_examples": COUNT,
        "shard_size": 20,
        "latent_shape": SHAPE,
        "mirror": True,
        "metadata": METADATA,
    }
    return CacheWriter(folder, **{**options, **changes})


def write_all(folder, **changes):
    writer = make_writer(folder, **changes)
    for shard in writer.missing_shards():
        writer.write_shard(shard, examples(writer.shard_range(shard)))
    return writer.finish()


@pytest.fixture
def cache(tmp_path):
    return write_all(tmp_path / "train")


def test_round_trip_in_any_order(cache):
    order = np.random.default_rng(0).permutation(COUNT)
    batch = cache.read(order)
    wanted = np.stack([moments(i) for i in order])
    np.testing.assert_array_equal(batch["moments"], wanted.astype(np.float16))
    np.testing.assert_array_equal(batch["moments_flip"], wanted[:, :, ::-1].astype(np.float16))
    np.testing.assert_array_equal(batch["label"], 5 * order)
    np.testing.assert_array_equal(batch["index"], order)
    assert cache.latent_shape == SHAPE
    assert cache.num_classes_seen == 5 * (COUNT - 1) + 1
    assert len(cache) == COUNT


def test_tfds_reads_the_same_without_tensorflow(cache):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(cache.folder)
    source = builder.as_data_source(split="train")
    assert len(source) == COUNT
    assert dict(builder.info.metadata)["encoder"] == METADATA["encoder"]
    for i in range(COUNT):
        theirs, ours = source[i], cache.read([i])
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(value, ours[name][0])
    assert "tensorflow" not in sys.modules


def test_our_parser_reads_what_tfds_serializes():
    tfds = pytest.importorskip("tensorflow_datasets")
    serializer = tfds.features.FeaturesDict(
        {
            "moments": tfds.features.Tensor(shape=(4, 4, 8), dtype=np.float16, encoding="bytes"),
            "label": tfds.features.Scalar(dtype=np.int32),
        }
    )
    features = {
        "moments": Feature(shape=(4, 4, 8), dtype="float16"),
        "label": Feature(shape=(), dtype="int32"),
    }
    for label in (-1, 0, 1, 127, 128, 16384, 2**31 - 1, -(2**31)):
        given = {"moments": moments(3).astype(np.float16), "label": label}
        batch = {"moments": np.empty((1, 4, 4, 8), np.float16), "label": np.empty(1, np.int32)}
        decode_record(serializer.serialize_example(given), features, batch, 0)
        np.testing.assert_array_equal(batch["moments"][0], given["moments"])
        assert batch["label"][0] == label


def test_statistics_are_those_of_posterior_samples(cache):
    stored = cache.read(range(COUNT))
    mean, logvar = np.split(
        np.concatenate([stored["moments"], stored["moments_flip"]]).astype(np.float64), 2, axis=-1
    )
    np.testing.assert_allclose(cache.metadata["channel_mean"], mean.mean((0, 1, 2)), rtol=1e-9)
    variance = mean.var((0, 1, 2)) + np.exp(logvar).mean((0, 1, 2))
    np.testing.assert_allclose(cache.metadata["channel_std"], np.sqrt(variance), rtol=1e-9)
    overall = np.sqrt(mean.var() + np.exp(logvar).mean())
    np.testing.assert_allclose(cache.metadata["std"], overall, rtol=1e-9)


def test_logvar_is_clamped_and_infinite_moments_are_refused(tmp_path):
    writer = make_writer(tmp_path / "train", num_examples=1, mirror=False)
    extreme = np.zeros((4, 4, 8), np.float32)
    extreme[..., 4], extreme[..., 5] = -1e9, 1e9
    writer.write_shard(0, [{"moments": extreme, "label": 0}])
    stored = writer.finish().read([0])["moments"][0]
    assert stored[..., 4].max() == -30 and stored[..., 5].min() == 20
    for value in (np.nan, np.inf, 1e6):
        bad = make_writer(tmp_path / "other", num_examples=1, mirror=False)
        with pytest.raises(UserError, match="example 0: moments is not finite"):
            bad.write_shard(0, [{"moments": np.full((4, 4, 8), value), "label": 0}])
        assert bad.missing_shards() == [0]


def test_batches_and_single_examples_write_the_same(tmp_path, cache):
    writer = make_writer(tmp_path / "batched" / "train")
    for shard in writer.missing_shards():
        rows = list(examples(writer.shard_range(shard)))
        batches = (rows[i : i + 7] for i in range(0, len(rows), 7))
        writer.write_shard(
            shard, ({k: np.stack([r[k] for r in rows]) for k in rows[0]} for rows in batches)
        )
    assert writer.finish().fingerprint == cache.fingerprint


def test_extra_arrays_travel_with_the_example(tmp_path):
    writer = make_writer(
        tmp_path / "train",
        num_examples=3,
        mirror=False,
        extra={"mask": ((8, 8), "uint8"), "tokens": ((2, 5), "int32"), "scene": ((), "int32")},
    )
    masks = np.random.default_rng(0).integers(0, 19, (3, 8, 8), np.uint8)
    tokens = np.arange(30, dtype=np.int32).reshape(3, 2, 5)
    writer.write_shard(
        0,
        (
            {"moments": moments(i), "label": 0, "mask": masks[i], "tokens": tokens[i], "scene": -i}
            for i in range(3)
        ),
    )
    batch = writer.finish().read([2, 0])
    np.testing.assert_array_equal(batch["mask"], masks[[2, 0]])
    np.testing.assert_array_equal(batch["tokens"], tokens[[2, 0]])
    np.testing.assert_array_equal(batch["scene"], [-2, 0])


def test_a_killed_encode_goes_on(tmp_path, cache):
    """SIGKILL in the middle of the second shard; another process finishes."""
    folder = tmp_path / "killed" / "train"
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_latents import examples, make_writer
        writer = make_writer({str(folder)!r})
        writer.write_shard(0, examples(writer.shard_range(0)))
        def dying():
            for count, example in enumerate(examples(writer.shard_range(1))):
                if count == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield example
        writer.write_shard(1, dying())
    """)
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="not finished"):
        open_cache(folder)
    writer = make_writer(folder)
    assert writer.missing_shards() == [1, 2]
    with pytest.raises(UserError, match=r"2 of 3 shards are missing, the first is 1"):
        writer.finish()
    for shard in reversed(writer.missing_shards()):
        writer.write_shard(shard, examples(writer.shard_range(shard)))
    assert writer.finish().fingerprint == cache.fingerprint
    assert make_writer(folder).finish().fingerprint == cache.fingerprint  # by every process


def test_wrong_number_of_examples_leaves_no_shard(tmp_path):
    writer = make_writer(tmp_path / "train")
    for indices in (range(19), range(21)):
        with pytest.raises(ValueError, match="shard 0"):
            writer.write_shard(0, examples(indices))
    assert writer.missing_shards() == [0, 1, 2]
    assert not list((tmp_path / "train").glob("*array_record*"))


def test_label_out_of_range_names_the_example(tmp_path):
    writer = make_writer(tmp_path / "train", metadata={**METADATA, "num_classes": 100})
    writer.write_shard(0, examples(range(20)))
    with pytest.raises(UserError, match="example 20: label 100 is out of range; expected 0 to 99"):
        writer.write_shard(1, examples(range(20, 40)))


def test_another_encoder_is_named_and_nothing_is_overwritten(cache):
    before = {p: p.stat().st_mtime_ns for p in cache.folder.rglob("*")}
    with pytest.raises(UserError, match=f"{'e' * 64}.*{'f' * 64}"):
        open_cache(cache.folder, encoder="f" * 64)
    with pytest.raises(UserError, match=f"encoder = {'e' * 64}; expected {'f' * 64}"):
        make_writer(cache.folder, metadata={**METADATA, "encoder": "f" * 64})
    with pytest.raises(UserError, match="count = 50; expected 49"):
        make_writer(cache.folder, num_examples=49)
    assert before == {p: p.stat().st_mtime_ns for p in cache.folder.rglob("*")}
    assert len(open_cache(cache.folder, encoder="e" * 64)) == COUNT


def test_shards_of_another_plan_are_not_taken_over(tmp_path):
    writer = make_writer(tmp_path / "train")
    writer.write_shard(0, examples(writer.shard_range(0)))
    (tmp_path / "train/plan.json").unlink()
    other = make_writer(tmp_path / "train", metadata={**METADATA, "encoder": "f" * 64})
    assert other.missing_shards() == [0, 1, 2]


def test_damage_is_one_line_that_names_the_file(cache):
    shard = sorted(cache.folder.glob("*.array_record-*"))[1]
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{shard.name}: {len(whole) - 1} bytes; expected"):
        open_cache(cache.folder)

    place = whole.index(moments(25).astype(np.float16).tobytes()) + 100
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=f"{shard.name}: checksum differs"):
        open_cache(cache.folder)
    unchecked = open_cache(cache.folder, verify=False)
    unchecked.read(range(20))
    with pytest.raises(UserError, match=f"{shard.name}: damaged shard"):
        unchecked.read([25])

    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing shard"):
        open_cache(cache.folder)
    (cache.folder / "metadata.json").write_text("{")
    with pytest.raises(UserError, match=r"metadata\.json: damaged"):
        open_cache(cache.folder)
    with pytest.raises(UserError, match="none there; run --job=encode"):
        open_cache(cache.folder.parent / "test")


def test_bucket_is_refused_in_one_line():
    with pytest.raises(UserError, match="gs://b/latents: ArrayRecord opens local paths only"):
        open_cache("gs://b/latents")


def test_moved_cache_opens(cache, tmp_path):
    moved = tmp_path / "elsewhere"
    cache.folder.rename(moved)
    assert open_cache(moved).fingerprint == cache.fingerprint
    text = (moved / "metadata.json").read_text() + (moved / "dataset_info.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads((moved / "metadata.json").read_text())["count"] == COUNT


features = st.dictionaries(
    st.text(max_size=5),
    st.binary(max_size=300) | st.integers(-(2**63), 2**63 - 1),
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(features)
def test_records_round_trip(given_features):
    parsed = parse_example(encode_example(given_features))
    assert {k: v if isinstance(v, int) else bytes(v) for k, v in parsed.items()} == given_features


@settings(max_examples=100, deadline=None)
@given(features, st.data())
def test_damaged_records_raise_nothing_but_record_errors(given_features, data):
    record = bytearray(encode_example(given_features))
    for _ in range(data.draw(st.integers(1, 4))):
        if record:
            record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    record = record[: data.draw(st.integers(0, len(record)))]
    try:
        parse_example(bytes(record))
    except RecordError:
        pass


def test_fixed_features_refuse_other_types_and_lengths():
    features = {
        "a": Feature(shape=(2,), dtype="float16"),
        "label": Feature(shape=(), dtype="int32"),
    }
    batch = {"a": np.empty((1, 2), np.float16), "label": np.empty(1, np.int32)}
    good = {"a": np.ones(2, np.float16), "label": np.int32(4)}
    decode_record(encode_record(good, features), features, batch, 0)
    assert batch["label"][0] == 4
    for wrong in (
        {"a": b"123", "label": 4},
        {"a": 3, "label": 4},
        {"a": b"1234"},
        {"a": b"1234", "label": 2**40},
    ):
        with pytest.raises(RecordError):
            decode_record(encode_example(wrong), features, batch, 0)
