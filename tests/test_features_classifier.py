"""The classifier that judges small images: trained on real digits, kept and found unaltered."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn.datasets

from lfm_jax.errors import UserError
from lfm_jax.features import (
    classifier_accuracy,
    load_extractor,
    predict,
    read_extractor_metadata,
    save_extractor,
    train_classifier,
)

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclasses.dataclass(frozen=True)
class Source:
    images: np.ndarray
    labels: np.ndarray
    num_classes: int = 10
    fingerprint: str = "digits"

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return {"image": self.images[indices], "label": self.labels[indices]}


def digits() -> tuple[Source, Source]:
    data = sklearn.datasets.load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[..., None]
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:1437], order[1437:]
    return Source(images[train], data.target[train]), Source(images[test], data.target[test])


@pytest.fixture(scope="module")
def trained():
    return train_classifier(*digits(), epochs=20, width=16, name="digits-cnn", progress=False)


def test_digits_are_recognised(trained):
    extractor, accuracy = trained
    assert accuracy >= 0.97
    assert classifier_accuracy(extractor, digits()[1]) == accuracy
    images = digits()[1].images[:7]
    features = jax.jit(lambda e, x: e(x)["features"])(extractor, images)
    assert features.shape == (7, extractor.dim)
    assert predict(extractor, images, batch_size=3).shape == (7,)


def test_seeds_give_independent_judges(trained):
    train, test = digits()
    small = [
        train_classifier(train, test, epochs=0.2, seed=s, progress=False)[0] for s in (0, 1, 1)
    ]
    prints = [e.fingerprint for e in small]
    assert prints[0] != prints[1] == prints[2]


def test_a_kept_judge_is_the_same(trained, tmp_path):
    extractor, accuracy = trained
    path = tmp_path / "extractors" / "digits.safetensors"
    for _ in range(2):  # writing again replaces
        save_extractor(path, extractor, accuracy=accuracy, source_fingerprint="digits")
    loaded = load_extractor(path)
    assert loaded.fingerprint == extractor.fingerprint
    assert loaded.pipeline == extractor.pipeline
    metadata = read_extractor_metadata(path)
    assert metadata["accuracy"] == accuracy and metadata["source_fingerprint"] == "digits"
    assert [f.name for f in path.parent.iterdir()] == ["digits.safetensors"]


def test_altered_or_missing_judges_are_named(trained, tmp_path):
    path = tmp_path / "judge.safetensors"
    save_extractor(path, trained[0])
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(UserError, match="do not match its own checksum"):
        load_extractor(path)
    path.write_bytes(data[:100])
    with pytest.raises(UserError, match="not readable"):
        load_extractor(path)
    with pytest.raises(UserError, match="no such file"):
        load_extractor(tmp_path / "none.safetensors")


def test_unlabelled_and_oblong_images_are_refused():
    train, test = digits()
    with pytest.raises(UserError, match="no labels"):
        train_classifier(dataclasses.replace(train, num_classes=0), test)
    with pytest.raises(UserError, match="8x6 images; accepted: square"):
        train_classifier(Source(train.images[:, :, :6], train.labels), test)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason=f"{FASHION}: Debian's dataset-fashion-mnist")
def test_fashion_mnist_reaches_91_percent():
    from lfm_jax.data import open_images

    train, test = (
        open_images("idx", path=str(FASHION), split=s, image_size=32, channels=1)
        for s in ("train", "test")
    )
    _, accuracy = train_classifier(train, test, name="fashion-cnn")
    assert accuracy >= 0.91
