"""How long is a training step, beside PyTorch's, and what does the loop around it add?

    python -m benchmarks.train_step [--parts step,loop] [--sizes S,B] [--repeats 7] [--no-record]

step: DiT-S/2 and B/2 on 32x32x4 latents in float32: noise excluded on both sides, loss, backward
pass and AdamW, beside the compact PyTorch DiT with fused attention, taking turns in one process
(`benchmarks.backbones`, which also has diffusers' and the forward pass alone). A ratio is the
median over the turns of ours / theirs.
loop: steps a second of `jobs.fit` with the real loader, logs and metrics, against the same compiled
step on batches that lie on the device already; turns as above.

Figures go to docs/results/scale.json.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from benchmarks import backbones
from benchmarks.figures import record
from benchmarks.loader import make_cache
from benchmarks.turns import take_turns
from lfm_jax import sharding
from lfm_jax.data import latent_batches, prefetch
from lfm_jax.flow import flow_matching_loss
from lfm_jax.jobs.fit import fit
from lfm_jax.models import create_model, init_params
from lfm_jax.optim import adamw, learning_rate
from lfm_jax.state import create_state, make_step

COMMAND = "python -m benchmarks.train_step --parts "


def step(sizes: list[str], repeats: int, write: bool) -> None:
    for size in sizes:
        _, ours = backbones.ours(size)
        _, theirs = backbones.pytorch(size, "compact")
        times = take_turns({"ours": ours, "theirs": theirs}, repeats)
        ratio = np.median(times["ours"] / times["theirs"])
        seconds = [np.median(t) for t in times.values()]
        print(f"DiT-{size}/2: {seconds[0]:.3f} s, PyTorch {seconds[1]:.3f} s, ratio {ratio:.3f}")
        if write:
            note = f"batch {backbones.BATCH[size]}, 32x32x4 latents, fp32, {repeats} turns"
            name = f"train step of DiT-{size}/2 over the compact PyTorch DiT's"
            name += ", a second measurement"  # `benchmarks.backbones` has the first
            record("scale", name, ratio, "<=", 1.0, COMMAND + "step", note)


def loop(repeats: int, write: bool, *, size: str = "S", batch: int = 8, steps: int = 6) -> None:
    """Overhead of everything around the step, per turn of `steps` steps after a warm-up window."""
    mesh = sharding.make_mesh()
    model = create_model(f"DiT-{size}/2", num_classes=1000, scan_blocks=False)
    key, tx = jax.random.key(0), adamw(learning_rate(1e-4, steps=1000))
    loss = flow_matching_loss(model, scale=0.18215, num_classes=1000)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(folder, 1024)

        def batches(start: int):
            return latent_batches(cache, global_batch=batch, seed=0, start=start)

        def fresh():
            return create_state(lambda: init_params(model, key, (32, 32, 4)), tx, mesh, ema=True)

        state = fresh()
        program = make_step(loss, tx, key, ema_decay=0.999, like=state)
        placed = prefetch(batches(0), sharding.batch_sharding(mesh))
        held = list(itertools.islice(placed, steps))
        placed.close()

        def bare(state) -> tuple[float, object]:
            begin = time.perf_counter()
            for one in held:
                state, metrics = program(state, one)
            jax.block_until_ready((state, metrics))
            return (time.perf_counter() - begin) / steps, state

        _, state = bare(state)
        for turn in range(repeats):
            before, state = bare(state)
            run = epath.Path(folder) / f"run{turn}"
            fit(
                "loop",
                fresh(),
                program,
                batches,
                folder=run / "checkpoints",
                logs=run / "logs",
                mesh=mesh,
                steps=3 * steps,
                batch_size=batch,
                record={},
                config={},
                log_every=steps,
                save_every=1000,
                train_flops=1.0,
            )
            after, state = bare(state)
            # The first window fills the loader and the last one is followed by the save.
            lines = Path(run / "logs/loop.jsonl").read_text().splitlines()
            inside = [1 / json.loads(line)["steps_per_second"] for line in lines[1:]]
            ratios.append(statistics.median(inside) / statistics.median((before, after)))
            print(f"bare {before:.3f} {after:.3f} s, in the loop {inside}: {ratios[-1]:.4f}")
    overhead = statistics.median(ratios) - 1
    print(f"overhead of the loop: {100 * overhead:.2f} %")
    if write:
        note = (
            f"DiT-{size}/2, batch {batch}, fp32, {repeats} turns of {2 * steps} steps; the "
            "loader's threads share the cores with the step; turns from "
            f"{100 * (min(ratios) - 1):.1f} to {100 * (max(ratios) - 1):.1f} %"
        )
        name = "overhead of the loop around the step"
        record("scale", name, overhead, "<=", 0.03, COMMAND + "loop", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="step,loop")
    parser.add_argument("--sizes", default="S,B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if "step" in parts:
        step(options.sizes.split(","), options.repeats, not options.no_record)
    if "loop" in parts:
        loop(options.repeats, not options.no_record)


if __name__ == "__main__":
    main()
