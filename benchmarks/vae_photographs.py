"""A small autoencoder on real photographs, whole and by tiles; see `benchmarks.vae`."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.figures import RESULTS
from benchmarks.vae_sides import coders, figure
from lfm_jax import vae


def photographs_of_scikit():
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    train = {"china": china, "flower": flower, "coffee": data.coffee()}
    return train, {"astronaut": data.astronaut(), "chelsea": data.chelsea()}


def small_photographic(steps):
    """A small autoencoder (factor 4) trained on crops of photographs, with its codec."""
    import optax

    # Two groups: a norm over two channels at a time takes colour away with their mean.
    model = vae.AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_groups=2, latent_channels=8
    )
    params = vae.init_vae(model, jax.random.key(0))
    loss = vae.autoencoder_loss(model, kl_weight=1e-5, reconstruction="l1")
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(50, steps // 4), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def step(params, state, batch):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            params, batch, jax.random.key(1)
        )
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics

    train, test = photographs_of_scikit()
    images, state, rng = list(train.values()), tx.init(params), np.random.default_rng(0)
    for i in range(steps):
        crops = []
        for _ in range(8):
            image = images[rng.integers(len(images))]
            y, x = (rng.integers(0, s - 64) for s in image.shape[:2])
            # Three photographs have few colours; with the channels in any order there are more.
            crops.append(image[y : y + 64, x : x + 64][:, :, rng.permutation(3)])
        position = np.arange(8 * i, 8 * (i + 1), dtype=np.uint32)
        params, state, metrics = step(
            params, state, {"image": np.stack(crops), "position": position}
        )
        if i % 50 == 0:
            print(f"step {i}: psnr {float(metrics['psnr']):.2f} dB", flush=True)
    return vae.make_codec(model, params), test


def multiple(image, factor):
    height, width = (s // factor * factor for s in image.shape[:2])
    return image[:height, :width]


def photographs(steps):
    codec, test = small_photographic(steps)
    reports = {}
    for name, image in test.items():
        crop = multiple(image, 64)[:256, :256]
        report = vae.reconstruction_report(codec, crop[None])
        reports[name] = crop
        note = (
            f"held-out photograph, 256x256; factor 4, 8 channels, trained {steps} steps on others"
        )
        figure(
            "photographs",
            f"PSNR of {name}, small autoencoder",
            report["psnr"],
            "report",
            None,
            note,
        )
        figure(
            "photographs",
            f"SSIM of {name}, small autoencoder",
            report["ssim"],
            "report",
            None,
            note,
        )
    with tempfile.TemporaryDirectory() as folder:
        vae.reconstruction_report(codec, np.stack(list(reports.values())), folder=folder)
        picture = Path(folder, "reconstruction.png").read_bytes()
    (RESULTS / "vae_reconstruction.png").write_bytes(picture)
    tiles_of_a_photograph(codec, test["astronaut"], steps)


def tiles_of_a_photograph(codec, image, steps):
    model, params = codec.model, codec.params
    encode, decode = coders(model)
    x = vae.from_uint8(multiple(image, 4)[None])
    z = encode(params, x)[..., : model.latent_channels]
    whole = np.asarray(decode(params, z))
    note = (
        f"astronaut 512x512 in the small autoencoder of {steps} steps, against the untiled decode"
    )
    exact = vae.decode_tiled(model, params, z, tile=128)
    error = float(np.abs(exact - whole).max())
    figure("photographs", "tiled decode of a photograph: max error", error, "<=", 1e-3, note)
    for label, options in {"halo 8": {}, "halo 2": {"halo": 2}}.items():
        rough = vae.decode_tiled(model, params, z, tile=32, exact=False, **options)
        psnr = float(10 * np.log10(4 / np.mean(np.square(rough - whole))))
        name = f"approximate tiled decode of a photograph: PSNR, tiles of 32 latents, {label}"
        figure("photographs", name, psnr, "report", None, note)
    side = 32
    alone = np.concatenate(
        [
            np.concatenate(
                [
                    np.asarray(decode(params, z[:, i : i + side, j : j + side]))
                    for j in range(0, z.shape[2], side)
                ],
                axis=2,
            )
            for i in range(0, z.shape[1], side)
        ],
        axis=1,
    )
    psnr = float(10 * np.log10(4 / np.mean(np.square(alone - whole))))
    name = "tiles decoded on their own, for comparison: PSNR"
    figure("photographs", name, psnr, "report", None, note)
