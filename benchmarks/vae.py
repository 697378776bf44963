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
import os
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import take_turns
from benchmarks.vae_photographs import photographs
from benchmarks.vae_sides import (
    STABLE_DIFFUSION,
    TINY,
    channels_first,
    coders,
    figure,
    inputs,
    shared_weights,
)
from lfm_jax import vae
from lfm_jax.vae import weights


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

    torch.set_num_threads(len(os.sched_getaffinity(0)))
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
            with torch.inference_mode():
                times = take_turns(sides, repeats, clocks)
            medians = {side: np.median(kept, axis=0) for side, kept in times.items()}
            wall, cpu = ({side: m[i] for side, m in medians.items()} for i in range(2))
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


def clocks():
    """Wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


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
