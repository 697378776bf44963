"""How fast the DiT is on a CPU against PyTorch, how long it compiles, how exact the imports are.

    python -m benchmarks.backbones [--parts speed,compile,parity,counts] [--sizes S,B]
                                   [--repeats 7] [--clock wall|cpu]

speed: DiT-S/2 and B/2 on 32x32x4 latents, forward and whole training step (loss, backward, AdamW),
against a compact PyTorch DiT with fused attention (`torch_dit`) and diffusers' DiT. All take turns
in one run; a ratio is the median over the turns of ours / theirs. Blocks are scanned, the default;
the unrolled network is printed beside it. ``--clock cpu`` counts the process's CPU time
with everything on one core: what to use on a machine that is not idle, where waiting threads
distort wall time (PyTorch's most).
compile: tracing and compiling DiT-XL/2's training step, blocks scanned, no cache.
parity, counts: each family against an independent network, parameters against the published sizes;
the cases are those of the tests.

Figures go to docs/results/backbones.json.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.figures import record
from benchmarks.turns import take_turns
from lfm_jax.models import Cond, create_model, init_params

SIDE, CHANNELS, CLASSES = 32, 4, 1000
BATCH = {"S": 8, "B": 4}
COMMAND = "python -m benchmarks.backbones --parts "
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))


def train_step(model, optimizer) -> Callable:
    """Loss, backward pass and update: what the PyTorch columns run, too."""

    def step(params, state, x, t, label, target):
        def loss(params):
            velocity = model.apply({"params": params}, x, t, Cond(label=label), train=True)
            return jnp.mean((velocity - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def batch_of(size: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (BATCH[size], SIDE, SIDE, CHANNELS)
    x, target = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return [
        x,
        rng.random(len(x)).astype(np.float32),
        rng.integers(0, CLASSES, len(x)),
        target,
    ]


def ours(size: str, *, scan: bool = True) -> tuple[Callable, Callable]:
    model = create_model(f"DiT-{size}/2", num_classes=CLASSES, scan_blocks=scan)
    params = init_params(model, jax.random.key(0), (SIDE, SIDE, CHANNELS))
    arrays = [jnp.asarray(a) for a in batch_of(size)]
    forward = jax.jit(lambda p, x, t, y: model.apply({"params": p}, x, t, Cond(label=y)))
    optimizer = optax.adamw(1e-4)
    step = train_step(model, optimizer)
    state = [params, optimizer.init(params)]

    def run_step():
        *state[:], loss = step(*state, *arrays)
        jax.block_until_ready((state, loss))

    return lambda: jax.block_until_ready(forward(state[0], *arrays[:3])), run_step


def pytorch(size: str, kind: str) -> tuple[Callable, Callable]:
    import torch

    model = create_model(f"DiT-{size}/2")
    arrays = [torch.from_numpy(a) for a in batch_of(size)]
    if kind == "diffusers":
        import diffusers

        network = diffusers.DiTTransformer2DModel(
            num_attention_heads=model.heads,
            attention_head_dim=model.hidden // model.heads,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=model.depth,
            sample_size=SIDE,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
        )
        arrays = [z.permute(0, 3, 1, 2).contiguous() if z.ndim == 4 else z for z in arrays]
        arrays[1] = (arrays[1] * 1000).long()
        call = lambda x, t, y: network(x, t, y).sample  # noqa: E731
    else:
        from benchmarks import torch_dit

        network = torch_dit.DiT(model.hidden, model.depth, model.heads, size=SIDE)
        call = network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    *inputs, target = arrays

    def forward():
        with torch.no_grad():
            call(*inputs)

    def step():
        optimizer.zero_grad()
        ((call(*inputs) - target) ** 2).mean().backward()
        optimizer.step()

    return forward, step


def one_core() -> None:
    """Both sides on one thread; before JAX starts its pool."""
    import torch

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def speed(sizes: list[str], repeats: int, clock: str, command: str) -> None:
    now = time.perf_counter if clock == "wall" else time.process_time
    how = "wall time" if clock == "wall" else "CPU time on one core, machine shared"
    for size in sizes:
        # One opponent after the other: four training states of B/2 would be 10 GB.
        for name, kind in (("compact PyTorch DiT", "compact"), ("diffusers DiT", "diffusers")):
            columns = {
                "ours": ours(size),
                "unrolled": ours(size, scan=False),
                "theirs": pytorch(size, kind),
            }
            for i, what in enumerate(("forward", "train step")):
                calls = {side: pair[i] for side, pair in columns.items()}
                times = take_turns(calls, repeats, now)
                medians = {side: float(np.median(t)) for side, t in times.items()}
                shown = {side: f"{1e3 * value:.0f} ms" for side, value in medians.items()}
                ratio = np.median(times["ours"] / times["theirs"])
                asked = ("<=", 1.0) if kind == "compact" else ("report", None)
                note = (
                    f"batch {BATCH[size]}, 32x32x4 latents, fp32, {how}, {repeats} turns; "
                    f"{shown['ours']} and {shown['theirs']}; "
                    f"unrolled blocks: {medians['unrolled'] / medians['theirs']:.2f}"
                )
                record("backbones", f"DiT-{size}/2 {what} / {name}", ratio, *asked, command, note)
                print(f"DiT-{size}/2 {what} / {name}: {ratio:.3f}", shown, flush=True)
            del columns, calls


def compile_time(command: str) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    model = create_model("DiT-XL/2", num_classes=CLASSES, scan_blocks=True)
    shape = (SIDE, SIDE, CHANNELS)
    params = jax.eval_shape(lambda k: init_params(model, k, shape), jax.random.key(0))
    optimizer = optax.adamw(1e-4)
    x = jax.ShapeDtypeStruct((8, *shape), jnp.float32)
    t, y = (jax.ShapeDtypeStruct((8,), d) for d in (jnp.float32, jnp.int32))
    state = jax.eval_shape(optimizer.init, params)
    start = time.perf_counter()
    train_step(model, optimizer).lower(params, state, x, t, y, x).compile()
    seconds = time.perf_counter() - start
    print(f"DiT-XL/2 train step compiles in {seconds:.1f} s")
    name = "DiT-XL/2 train step compile seconds, scanned blocks"
    record("backbones", name, seconds, "<=", 30.0, command, "tracing included, no cache, AdamW")


def parity(command: str) -> None:
    import test_dit
    import test_weights

    with tempfile.TemporaryDirectory() as folder:
        for case in test_weights.CASES:
            error = test_weights.forward_error(case, pathlib.Path(folder))
            print(f"{case}: {error:.1e}")
            note = "random weights in every tensor, small sizes, relative to the largest output"
            record("backbones", f"forward parity, {case}", error, "<=", 1e-4, command, note)
        for case, check in test_weights.DIFFUSERS.items():
            error = check(pathlib.Path(folder))[2]
            print(f"{case}: {error:.1e}")
            note = "against diffusers' own class, random weights, relative to the largest output"
            record("backbones", f"forward parity, {case}", error, "<=", 1e-4, command, note)
    error = test_dit.gradient_error()
    print(f"DiT gradients: {error:.1e}")
    note = "largest error of any tensor, relative to its largest entry; compact PyTorch DiT"
    record("backbones", "gradient parity, DiT", error, "<=", 1e-4, command, note)


def counts(command: str) -> None:
    import test_dit
    import test_models

    rows = [test_dit.count_of(*row) for row in test_dit.COUNTS]
    rows += [test_models.count_of(*row) for row in test_models.COUNTS]
    for name, found, published in rows:
        print(f"{name:40s} {found:>9s} M, published {published}")
    agree = sum(found == published for _, found, published in rows)
    name = "published parameter counts reproduced, share of rows"
    record("backbones", name, agree / len(rows), "==", 1.0, command, f"{len(rows)} networks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="speed,compile,parity,counts")
    parser.add_argument("--sizes", default="S,B")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.clock == "cpu":
        one_core()
    for part in options.parts.split(","):
        if part == "speed":
            command = f"{COMMAND}speed --clock {options.clock}"
            speed(options.sizes.split(","), options.repeats, options.clock, command)
        elif part == "compile":
            compile_time(COMMAND + part)
        else:
            {"parity": parity, "counts": counts}[part](COMMAND + part)


if __name__ == "__main__":
    main()
