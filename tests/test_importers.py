"""Latent stores in the layouts of other projects, made here byte for byte as those write them."""

import itertools
import json
import zipfile

import numpy as np
import pytest

from lfm_jax.data.importers import import_latents
from lfm_jax.data.latent_stores import SD_SCALE
from lfm_jax.errors import UserError

OPTIONS = {"encoder": "e" * 64, "scale": SD_SCALE, "image_size": 64, "shard_size": 4}
COUNT = 6


def statistics(index: int, channels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, channels first, like an SD encoder's."""
    random = np.random.default_rng(index)
    mean = random.normal(0, 5, (channels, 8, 8)).astype(np.float32)
    return mean, np.exp(random.normal(-5, 2, (channels, 8, 8))).astype(np.float32)


def check(cache, labels, *, widths=True):
    batch = cache.read(range(len(cache)))
    mean, logvar = np.split(batch["moments"].astype(np.float64), 2, axis=-1)
    for i in range(len(cache)):
        wanted_mean, wanted_std = (np.moveaxis(x, 0, -1) for x in statistics(i))
        # float16 keeps 11 bits of a mean, and of a log-variance of up to 16 an absolute 1/128.
        np.testing.assert_allclose(mean[i], wanted_mean, rtol=2**-11, atol=1e-6)
        if widths:
            np.testing.assert_allclose(np.exp(logvar[i] / 2), wanted_std, rtol=0.009)
        else:
            assert (logvar[i] == -30).all()
    assert batch["label"].tolist() == labels
    assert cache.metadata["encoder"] == "e" * 64 and cache.metadata["scale"] == SD_SCALE


def write_edm2(folder):
    rows = []
    for i in range(COUNT):
        name = f"{i // 4:05d}/img-mean-std-{i:08d}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, np.concatenate(statistics(i)))
        rows.append([name, 10 * i])
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))


def test_edm2_and_repa(tmp_path):
    write_edm2(tmp_path / "store")
    cache = import_latents("edm2", tmp_path / "store", tmp_path / "train", **OPTIONS)
    check(cache, [0, 10, 20, 30, 40, 50])
    assert cache.metadata["origin"]["kind"] == "edm2"
    with zipfile.ZipFile(tmp_path / "store.zip", "w") as archive:
        for path in (tmp_path / "store").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "store"))
    packed = import_latents("edm2", tmp_path / "store.zip", tmp_path / "zip/train", **OPTIONS)
    assert packed.fingerprint == cache.fingerprint


def test_mar_with_the_mirror_image(tmp_path):
    for i in range(COUNT):
        mean, std = statistics(i)
        moments = np.concatenate([mean, 2 * np.log(std)])
        path = tmp_path / "store" / ("n01440764", "n01443537")[i // 3] / f"{i}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=moments, moments_flip=moments[..., ::-1])
    cache = import_latents("mar", tmp_path / "store", tmp_path / "train", **OPTIONS)
    check(cache, [0, 0, 0, 1, 1, 1])
    batch = cache.read([1])
    np.testing.assert_array_equal(batch["moments_flip"], batch["moments"][:, :, ::-1])


def test_meanflow(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "store").mkdir()
    for i in range(COUNT):
        image = torch.from_numpy(np.concatenate(statistics(i)))
        torch.save({"image": image, "label": i % 3}, tmp_path / f"store/{i:08d}.pt")
    cache = import_latents("meanflow", tmp_path / "store", tmp_path / "train", **OPTIONS)
    check(cache, [0, 1, 2, 0, 1, 2])
    # A pickle that would run something is refused by name, not run.
    mark = tmp_path / "mark"
    payload = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    (tmp_path / "store/00000000.pt").write_bytes(payload)
    with pytest.raises(UserError, match=r"00000000\.pt: not readable"):
        import_latents("meanflow", tmp_path / "store", tmp_path / "other", **OPTIONS)
    assert not mark.exists()


def test_fast_dit_samples_become_points(tmp_path):
    for part in ("features", "labels"):
        (tmp_path / f"store/imagenet256_{part}").mkdir(parents=True)
    for i in range(12):  # by number: "10" comes after "9"
        sample = statistics(i)[0][None] * np.float32(SD_SCALE)
        np.save(tmp_path / f"store/imagenet256_features/{i}.npy", sample)
        np.save(tmp_path / f"store/imagenet256_labels/{i}.npy", np.array([i]))
    cache = import_latents("fast_dit", tmp_path / "store", tmp_path / "train", **OPTIONS)
    check(cache, list(range(12)), widths=False)
    assert cache.metadata["origin"]["scale_undone"] == SD_SCALE


def test_no_width_stays_finite(tmp_path):
    (tmp_path / "store").mkdir()
    mean = statistics(0)[0]
    np.save(tmp_path / "store/a.npy", np.concatenate([mean, np.zeros_like(mean)]))
    (tmp_path / "store/dataset.json").write_text('{"labels": null}')
    cache = import_latents("edm2", tmp_path / "store", tmp_path / "train", **OPTIONS)
    assert (cache.read([0])["moments"][..., 4:] == -30).all()
    assert cache.read([0])["label"].tolist() == [-1]


def test_bad_stores_are_named(tmp_path):
    attempts = itertools.count()

    def run(kind="edm2"):
        # Each time another cache: one that was begun belongs to the store as it was then.
        folder = tmp_path / f"caches{next(attempts)}/train"
        return import_latents(kind, tmp_path / "store", folder, **OPTIONS)

    with pytest.raises(UserError, match="expected one of edm2, mar, meanflow, fast_dit"):
        run("imagenet")
    with pytest.raises(UserError, match="no such file or folder"):
        run()
    write_edm2(tmp_path / "store")
    for kind, expected in (
        ("mar", r"class/name\.npz"),
        ("meanflow", r"\.pt"),
        ("fast_dit", "_features"),
    ):
        with pytest.raises(UserError, match=f"expected .*{expected}"):
            run(kind)
    assert not list(tmp_path.glob("caches*"))
    victim = tmp_path / "store/00001/img-mean-std-00000005.npy"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"00000005\.npy: not readable"):
        run()
    np.save(victim, np.zeros((8, 4, 4), np.float32))
    with pytest.raises(UserError, match=r"00000005\.npy: moments of shape \(4, 4, 8\); expected"):
        run()
    np.save(victim, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"00000005\.npy: not readable"):
        run()
    victim.write_bytes(whole)
    assert len(run()) == COUNT
    (tmp_path / "store/dataset.json").write_text('{"labels": [["00000/x.npy", 1]]}')
    with pytest.raises(UserError, match=r"no label for 00000/img-mean-std-00000000\.npy"):
        run()
