"""Images a second of the SD VAE on a GPU in bfloat16, beside PyTorch's own on the same card.

    python -m benchmarks.vae_gpu [--batches 16 64] [--repeats 10]

PyTorch runs diffusers' class in its best form: channels last, bfloat16, compiled. Both sides take
turns in one process; a figure is the ratio of the medians. Figures go to docs/results/vae.json.
Needs a GPU that both jax and torch see.
"""

import argparse
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card is shared with PyTorch

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import record
from benchmarks.turns import take_turns
from benchmarks.vae_sides import STABLE_DIFFUSION, channels_first, coders, inputs, shared_weights


def pytorch(oracle):
    """Compiled encode and decode in bfloat16, channels last."""
    import torch

    network = oracle.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    encode = torch.compile(lambda x: network.encode(x).latent_dist.parameters, mode="max-autotune")
    decode = torch.compile(lambda z: network.decode(z).sample, mode="max-autotune")

    def timed(function):
        def run(x):
            with torch.inference_mode():
                function(x)
            torch.cuda.synchronize()

        return run

    return timed(encode), timed(decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("benchmarks.vae_gpu: jax sees no GPU")
    import torch

    oracle, model, params = shared_weights(STABLE_DIFFUSION)
    ours = coders(model.clone(dtype=jnp.bfloat16))
    theirs = pytorch(oracle)
    for batch in args.batches:
        x, z = inputs(batch, 256, 256)
        for i, (verb, array) in enumerate((("encode", x), ("decode", z))):
            placed = jnp.asarray(array, jnp.bfloat16)
            tensor = channels_first(array).to("cuda", torch.bfloat16)
            tensor = tensor.contiguous(memory_format=torch.channels_last)
            sides = {
                "ours": lambda f=ours[i], a=placed: f(params, a).block_until_ready(),
                "torch": lambda f=theirs[i], a=tensor: f(a),
            }
            seconds = take_turns(sides, args.repeats)
            rate = {name: batch / float(np.median(s)) for name, s in seconds.items()}
            note = (
                f"bf16, 256x256, batch {batch}, median of {args.repeats}, alternating; PyTorch "
                f"{rate['torch']:.0f} images/s, channels last, compiled"
            )
            command = "python -m benchmarks.vae_gpu"
            name = f"{verb} on a GPU, bf16, batch {batch}"
            record("vae", f"{name}: images/s", rate["ours"], "report", None, command, note)
            ratio = rate["ours"] / rate["torch"]
            record("vae", f"{name}: images/s over PyTorch's", ratio, "report", None, command, note)
            print(f"{name}: {rate['ours']:.0f} images/s, PyTorch {rate['torch']:.0f}", flush=True)


if __name__ == "__main__":
    main()
