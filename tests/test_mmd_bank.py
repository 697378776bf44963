"""The real side of a finetuning: what its rows depend on, and which examples are mirrored."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lfm_jax import mmd
from lfm_jax.config import default_config
from lfm_jax.data import LatentCache
from lfm_jax.evaluate import FeatureStatistics
from lfm_jax.features import Classifier, Extractor
from lfm_jax.jobs import build, mmd_bank, mmd_features
from lfm_jax.models import create_model, init_params
from lfm_jax.vae import identity_codec
from lfm_jax.workdir import Workdir

SIDE = 4


def tokens(**changes):
    model = create_model("DiT", hidden=16, depth=2, heads=2, patch=2, **changes.pop("model", {}))
    params = init_params(model, jax.random.key(0), (SIDE, SIDE, 1))
    return mmd.BackboneTokens(
        **{"params": params, "model": model, "times": (0.25,), "taps": ("block_00",), **changes}
    )


def decoded(codec=None, entries=("features",), **changes):
    model = Classifier(3, width=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    extractor = Extractor(params=params, model=model, name="random", dim=128, input_size=16,
                          channels=1, resize="bilinear")  # fmt: skip
    codec = codec or identity_codec(1)
    return mmd.Decoded(codec=codec, extractor=extractor.replace(**changes), entries=entries)


@pytest.mark.parametrize(
    "one, other",
    [
        (tokens, lambda: tokens(times=(0.5,))),
        (tokens, lambda: tokens(taps=("block_01",))),
        (tokens, lambda: tokens(model={"dtype": "bfloat16"})),
        (decoded, lambda: decoded(resize="bicubic")),
        (decoded, lambda: decoded(crop=True)),
        (decoded, lambda: decoded(mean=(128.0,))),
        (decoded, lambda: decoded(std=(64.0,))),
        (decoded, lambda: decoded(entries=("logits",))),
        (decoded, lambda: decoded(codec=identity_codec(1).replace(scale=0.5))),
    ],
)
def test_maps_with_other_rows_have_another_identity(one, other):
    assert mmd_bank.identity(one()) == mmd_bank.identity(one())
    assert mmd_bank.identity(one()) != mmd_bank.identity(other())


def test_how_many_images_are_decoded_at_a_time_makes_no_other_bank():
    few = decoded(codec=identity_codec(1).replace(slice_size=2))
    assert mmd_bank.identity(few) == mmd_bank.identity(decoded())


@pytest.mark.parametrize("decoder", ["autoencoder", "preview"])
def test_features_are_seen_through_the_decoder_that_the_config_names(monkeypatch, decoder):
    own, tiny = identity_codec(1), identity_codec(1).replace(scale=2.0)
    judge = mmd_features.Judge(
        map=None, labels=np.zeros(2, int), statistics=FeatureStatistics.of(np.eye(3)), spread=1.0
    )
    judged = []
    monkeypatch.setattr(build, "preview_codec", lambda config, codec: tiny)
    monkeypatch.setattr(
        mmd_features, "open_extractor", lambda *_, **__: decoded(resize="tf1").extractor
    )
    monkeypatch.setattr(mmd_features, "_judge", lambda _, codec, *__: judged.append(codec) or judge)
    config = default_config()
    config.mmd.features, config.mmd.decoder = ("inception",), decoder
    config.data.image_size = 32
    workdir = Workdir(epath.Path())
    (found,), _, _ = mmd_features.feature_maps(config, workdir, own, Cache(), None, {})
    assert found.codec is (own if decoder == "autoencoder" else tiny)
    assert found.extractor.resize == "bicubic"
    assert judged[0] is own


class Cache(LatentCache):
    """Latents that are images, dark on the left, and their mirror images."""

    fingerprint = "a cache"

    def __init__(self, count=500):
        rng = np.random.default_rng(0)
        ramp = np.linspace(-1, 1, SIDE)[None, None, :, None]
        self.x = np.broadcast_to(ramp, (count, SIDE, SIDE, 1)) * rng.uniform(
            0.5, 1, (count, 1, 1, 1)
        )

    def __len__(self):
        return len(self.x)

    def read(self, at):
        def moments(x):
            return np.concatenate([x, np.full_like(x, -30)], axis=-1).astype(np.float16)

        x = self.x[at]
        return {"moments": moments(x), "moments_flip": moments(x[:, :, ::-1]),
                "label": np.zeros(len(at), np.int32), "index": np.asarray(at)}  # fmt: skip

    def batch(self, at):
        """As of images, which are the latents."""
        return {"image": np.asarray((self.x[at] + 1) * 127.5, np.uint8)}


def rows_of(config, cache, maps):
    """Rows by name, of the examples in order."""
    found, _ = mmd_bank.feature_rows(
        config, identity_codec(1), cache, maps, np.arange(len(cache)), None
    )
    return found


@flax.struct.dataclass
class Pixels(mmd.Decoded):
    """The pixels themselves."""

    def _rows(self, pixels):
        return {"pixels": pixels.reshape(len(pixels), -1)}


def test_where_training_mirrors_half_of_the_examples_are_images_and_latents_alike(monkeypatch):
    config, cache = default_config(), Cache()
    monkeypatch.setattr(build, "images", lambda *_: cache)
    maps = [mmd.RawLatents(), Pixels(codec=identity_codec(1), extractor=decoded().extractor)]

    def falling(config):
        found = rows_of(config, cache, maps)
        squares = [found[name].reshape(-1, SIDE, SIDE) for name in ("raw", "pixels")]
        return [x[:, 0, 0] > x[:, 0, -1] for x in squares]

    assert not np.any(falling(config))
    config.train.mirror = True
    latents, images = falling(config)
    assert 0.4 < latents.mean() < 0.6
    np.testing.assert_array_equal(latents, images)
    np.testing.assert_array_equal(latents, falling(config)[0])


def test_a_bank_is_not_taken_for_one_of_another_crop_or_without_mirrors(monkeypatch, tmp_path):
    config, cache, made = default_config(), Cache(), []
    config.mmd.networks, config.mmd.target = str(tmp_path), "latents"
    original = mmd_bank.feature_rows

    def counted(*arguments):
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(mmd_bank, "feature_rows", counted)
    codec = identity_codec(1)

    def bank():
        workdir = Workdir(epath.Path(tmp_path))
        return mmd_bank.real_bank(config, workdir, codec, cache, [mmd.RawLatents()], None, {})

    bank(), bank()
    assert len(made) == 1
    config.train.mirror = True
    bank(), bank()
    assert len(made) == 2
    config.data.fit = "crop"
    bank(), bank()
    assert len(made) == 3
