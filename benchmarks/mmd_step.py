"""How long is an MMD finetuning step beside the same step in PyTorch?

    python -m benchmarks.mmd_step [--steps 4] [--batch 4] [--repeats 5] [--no-record]

DiT-S/2 on 32x32x4 latents in float32: four Euler steps differentiated through with one step's
activations held at a time (checkpointing on both sides), the Gaussian MMD between the batch's
samples and as many fixed rows of raw latents, AdamW. Both sides take turns in one process.
`benchmarks.mmd_cost` has memory, and the time against a flow-matching step.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import record
from benchmarks.turns import take_turns
from lfm_jax import mmd, sharding
from lfm_jax.models import create_model, init_params
from lfm_jax.optim import adamw
from lfm_jax.state import create_state, make_step

SHAPE, CLASSES, BANDWIDTH, ROWS = (32, 32, 4), 1000, 64.0, 64
COMMAND = "python -m benchmarks.mmd_step"


def ours(batch: int, steps: int) -> Callable[[], None]:
    model = create_model("DiT-S/2", num_classes=CLASSES, scan_blocks=False)
    maps, size = [mmd.RawLatents()], int(np.prod(SHAPE))
    rows = mmd.row_generator(model, maps, SHAPE, num_classes=CLASSES, steps=(steps,))
    space = mmd.Space(
        kernel=mmd.Gaussian(bandwidth=BANDWIDTH), mean=jnp.zeros(size), scale=jnp.ones(size)
    )
    random = np.random.default_rng(0)
    real = {"raw": random.normal(size=(ROWS, size)).astype(np.float32)}
    bank = mmd.make_bank(real, np.zeros(ROWS, np.int32))
    loss = mmd.mmd_loss(rows, {"raw": space}, bank=bank, bank_rows=ROWS)
    key, tx = jax.random.key(0), adamw(lambda step: 1e-4)
    mesh = sharding.make_mesh()
    state = [create_state(lambda: init_params(model, key, SHAPE), tx, mesh, ema=False)]
    step = make_step(loss, tx, key, like=state[0])
    position = np.arange(batch, dtype=np.uint32)
    told = {"position": position, "label": np.zeros(batch, np.int32)}

    def run() -> None:
        state[0], metrics = step(state[0], told)
        jax.block_until_ready((state[0], metrics))

    return run


def pytorch(batch: int, steps: int) -> Callable[[], None]:
    import torch
    from torch.utils.checkpoint import checkpoint

    from benchmarks import torch_dit

    model = create_model("DiT-S/2")
    network = torch_dit.DiT(model.hidden, model.depth, model.heads, size=SHAPE[0])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    real = torch.randn(ROWS, int(np.prod(SHAPE)))
    label = torch.zeros(batch, dtype=torch.long)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * BANDWIDTH**2))

    def run() -> None:
        optimizer.zero_grad()
        x = torch.randn(batch, *SHAPE)
        for i in range(steps):
            t = torch.full((batch,), 1 - i / steps)
            x = x - checkpoint(network, x, t, label, use_reentrant=False) / steps
        rows = x.flatten(1)
        pairs = kernel(rows, rows)
        apart = (pairs.sum() - pairs.diagonal().sum()) / (batch * (batch - 1))
        (apart - 2 * kernel(rows, real).mean()).backward()
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    sides = {"ours": ours, "PyTorch": pytorch}
    calls = {name: side(options.batch, options.steps) for name, side in sides.items()}
    times = take_turns(calls, options.repeats)
    ratio = np.median(times["ours"] / times["PyTorch"])
    print(", ".join(f"{name} {np.median(t):.3f} s" for name, t in times.items()))
    print(f"ratio {ratio:.3f}")
    if not options.no_record:
        note = (
            f"N={options.steps} Euler steps, batch {options.batch}, fp32, {options.repeats} turns"
        )
        name = "MMD step of DiT-S/2 over the same in PyTorch"
        record("scale", name, ratio, "report", None, COMMAND, note)


if __name__ == "__main__":
    main()
