"""The autoencoder beside diffusers' PyTorch class: parity, speed, memory, tiles, photographs.

    python -m benchmarks.vae parity speed memory tiling photographs
    python -m benchmarks.vae rss          # decodes 64 images twice: minutes on two cores

Both sides run in float32 on the same random weights, in one process, one after the other, and the
ratio is that of the medians. PyTorch runs as diffusers builds it (channels first); with
``--channels_last`` in that layout, too. Figures go to docs/results/vae.json, the picture
beside it.
"""

import argparse
import copy
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import RESULTS, record
from lfm_jax import vae
from lfm_jax.vae import weights

STABLE_DIFFUSION = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
TINY = STABLE_DIFFUSION | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}


def figure(part, name, value, op, bound, note=""):
    holds = record("vae", name, value, op, bound, f"python -m benchmarks.vae {part}", note)
    shown = value if isinstance(value, int | bool) else f"{value:.4g}"
    print(f"{name}: {shown} {op} {bound} {'' if holds else 'DOES NOT HOLD'}", flush=True)


def shared_weights(config, seed=0):
    """diffusers' module and ours with its weights; norms and biases moved off ones and zeros."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    oracle = diffusers.AutoencoderKL(**config).eval()
    with torch.no_grad():
        for value in oracle.parameters():
            if value.ndim == 1:
                value += 0.2 * torch.randn(value.shape)
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        model, params = vae.load_vae(folder)
    return oracle, model, jax.device_put(params)


def coders(model):
    """Jitted moments and decode as functions of parameters and arrays, as jobs run them."""
    codec = vae.make_codec(model, {}, scale=1.0, shift=0.0)

    def encode(params, x):
        return codec.replace(params=params).encode_moments(x)

    def decode(params, z):
        return codec.replace(params=params).decode(z)

    return jax.jit(encode), jax.jit(decode)


def channels_first(x):
    import torch

    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def inputs(batch, height, width, factor=8, channels=4):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.5, (batch, height, width, 3)).astype(np.float32)
    z = rng.normal(size=(batch, height // factor, width // factor, channels)).astype(np.float32)
    return x, z


def parity():
    import torch

    cases = [
        ("full SD config 64x64", STABLE_DIFFUSION, 64, 64),
        ("full SD config 256x256", STABLE_DIFFUSION, 256, 256),
        ("tiny config 48x80", TINY, 48, 80),
    ]
    for name, config, height, width in cases:
        oracle, model, params = shared_weights(config)
        encode, decode = coders(model)
        x, z = inputs(1, height, width)
        with torch.inference_mode():
            posterior = oracle.encode(channels_first(x)).latent_dist
            expected = {
                "moments": torch.cat([posterior.mean, posterior.logvar], 1),
                "mode": posterior.mode(),
                "decode": oracle.decode(channels_first(z)).sample,
            }
        moments = encode(params, x)
        got = {"moments": moments, "mode": moments[..., :4], "decode": decode(params, z)}
        for what, value in expected.items():
            value = value.permute(0, 2, 3, 1).numpy()
            error = np.abs(np.asarray(got[what]) - value).max() / value.std()
            note = "max error over the output's standard deviation, fp32, random weights"
            figure("parity", f"parity: {what}, {name}", float(error), "<=", 1e-4, note)
        if config is STABLE_DIFFUSION:
            count = sum(v.size for v in jax.tree.leaves(params))
            figure("parity", "parameters of the SD config", count, "==", 83_653_863)


def speed(repeats, batches, channels_last):
    import torch

    torch.set_num_threads(max(len_of_affinity(), 1))
    oracle, model, params = shared_weights(STABLE_DIFFUSION)
    encode, decode = coders(model)
    last = copy.deepcopy(oracle).to(memory_format=torch.channels_last) if channels_last else None
    for batch in batches:
        x, z = inputs(batch, 256, 256)
        xt, zt = channels_first(x), channels_first(z)
        xl, zl = (v.to(memory_format=torch.channels_last) for v in (xt, zt))
        x, z = jnp.asarray(x), jnp.asarray(z)
        runs = {
            "encode": {
                "ours": lambda x=x: encode(params, x).block_until_ready(),
                "torch": lambda xt=xt: oracle.encode(xt),
                "channels last": lambda xl=xl: last.encode(xl),
            },
            "decode": {
                "ours": lambda z=z: decode(params, z).block_until_ready(),
                "torch": lambda zt=zt: oracle.decode(zt),
                "channels last": lambda zl=zl: last.decode(zl),
            },
        }
        for verb, sides in runs.items():
            if not channels_last:
                del sides["channels last"]
            wall, cpu = {k: [] for k in sides}, {k: [] for k in sides}
            with torch.inference_mode():
                for repeat in range(repeats + 1):
                    for side, run in sides.items():
                        start, start_cpu = time.perf_counter(), time.process_time()
                        run()
                        if repeat:  # the first compiles and warms up
                            wall[side].append(time.perf_counter() - start)
                            cpu[side].append(time.process_time() - start_cpu)
            wall = {k: float(np.median(v)) for k, v in wall.items()}
            cpu = {k: float(np.median(v)) for k, v in cpu.items()}
            name = f"{verb} 256x256, batch {batch}: time over diffusers' PyTorch"
            note = (
                f"median of {repeats}, alternating; ours {wall['ours']:.2f} s, PyTorch "
                f"{wall['torch']:.2f} s; CPU seconds {cpu['ours']:.2f} and {cpu['torch']:.2f}"
            )
            figure("speed", name, wall["ours"] / wall["torch"], "<=", 1.0, note)
            ratio = cpu["ours"] / cpu["torch"]
            figure("speed", f"{name}, CPU seconds", ratio, "report", None, note)
            if not channels_last:
                continue
            note = f"as above, PyTorch's channels-last layout at {wall['channels last']:.2f} s"
            ratio = wall["ours"] / wall["channels last"]
            figure("speed", f"{name}, channels last", ratio, "report", None, note)


def len_of_affinity():
    import os

    return len(os.sched_getaffinity(0))


def memory():
    model = vae.AutoencoderKL()
    params = weights.parameter_shapes(model)

    def peak(function, batch):
        z = jax.ShapeDtypeStruct((batch, 32, 32, 4), jnp.float32)
        analysis = jax.jit(function).lower(params, z).compile().memory_analysis()
        return (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            + analysis.temp_size_in_bytes
        )

    whole = peak(lambda p, z: model.apply({"params": p}, z, method="decode"), 4)
    sliced = peak(lambda p, z: vae.decode_sliced(model, p, z, slice_size=4), 64)
    note = (
        f"XLA's plan (arguments, outputs, temporaries): {sliced / 2**20:.0f} MiB for 64 in slices "
        f"of 4, {whole / 2**20:.0f} MiB for a batch of 4"
    )
    name = "peak memory of decoding 64 at 256x256 by slices over a batch of 4"
    figure("memory", name, sliced / whole, "<=", 1.5, note)


def decode_and_report(batch):
    """In a process of its own: decode and print the peak resident memory in MiB."""
    model = vae.AutoencoderKL()
    rng = np.random.default_rng(0)
    shapes = weights.parameter_shapes(model)
    params = jax.tree.map(lambda s: 0.02 * rng.normal(size=s.shape).astype(np.float32), shapes)
    z = rng.normal(size=(batch, 32, 32, 4)).astype(np.float32)
    decode = jax.jit(lambda p, z: vae.decode_sliced(model, p, z, slice_size=4))
    decode(jax.device_put(params), z).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def rss():
    def peak(batch):
        command = [sys.executable, "-m", "benchmarks.vae", "decode", "--batch", str(batch)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    whole, sliced = peak(4), peak(64)
    note = f"ru_maxrss of a process each: {sliced:.0f} MiB and {whole:.0f} MiB"
    name = "peak resident memory of decoding 64 at 256x256 by slices over a batch of 4"
    figure("rss", name, sliced / whole, "<=", 1.5, note)


def photographs_of_scikit():
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    train = {"china": china, "flower": flower, "coffee": data.coffee()}
    return train, {"astronaut": data.astronaut(), "chelsea": data.chelsea()}


def small_photographic(steps):
    """A small autoencoder (factor 4) trained on crops of photographs, with its codec."""
    import optax

    model = vae.AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_groups=8, latent_channels=8
    )
    params = vae.init_vae(model, jax.random.key(0))
    loss = vae.autoencoder_loss(model, kl_weight=1e-5, reconstruction="l1")
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

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


def tiling():
    _, model, params = shared_weights(TINY)
    encode, decode = coders(model)
    x, z = inputs(1, 512, 768)
    whole = np.asarray(decode(params, z))
    tiled = vae.decode_tiled(model, params, z, tile=192)
    error = float(np.abs(tiled - whole).max() / whole.std())
    note = "512x768 in tiles of 192 pixels, random weights, over the output's standard deviation"
    figure("tiling", "tiled decode: max error against the untiled", error, "<=", 1e-3, note)
    whole = np.asarray(encode(params, x))
    tiled = vae.encode_tiled(model, params, x, tile=192).moments
    error = float(np.abs(tiled - whole).max() / whole.std())
    figure("tiling", "tiled encode: max error against the untiled", error, "<=", 1e-3, note)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["parity", "speed", "memory", "tiling", "photographs", "rss", "decode"]
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="of speed")
    parser.add_argument("--channels_last", action="store_true", help="speed of this layout, too")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    run = {
        "parity": parity,
        "speed": lambda: speed(args.repeats, args.batches, args.channels_last),
        "memory": memory,
        "tiling": tiling,
        "photographs": lambda: photographs(args.steps),
        "rss": rss,
        "decode": lambda: decode_and_report(args.batch),
    }
    for part in args.parts:
        run[part]()


if __name__ == "__main__":
    main()
