"""Images a second and MFU of the DiT's train step on one H200-class card, in bfloat16.

    python -m benchmarks.train_step_gpu [--models DiT-L/2,DiT-XL/2] [--batch 256] [--steps 50]
        [--settings scan/cudnn/dots/1 ...] [--peer] [--profile FOLDER] [--no-record]
    python -m benchmarks.train_step_gpu --smoke [--peer]     tiny network, any device, no record

The whole step is timed: a batch of the real loader (a cache of noise in a temporary folder, read at
random), posterior, noise, loss, backward pass, AdamW, average, donated state. The host waits for
the device once, at a window's end. MFU is ``images/s * 6 MACs / stated peak`` by the closed form.
Settings are ``blocks/attention/remat/accumulate``; each is tried in short windows, the best one is
measured. Every trial has a process of its own: what one holds, another could not have.

--peer: the compact PyTorch DiT in its best form (compiled, bfloat16 autocast, fused attention and
AdamW, foreach average), same batch and loader, in turns with ours, each with the card to itself.
--profile: a trace of a few steps in FOLDER/<model> and its five largest costs by kernel time.

Figures go to docs/results/scale.json.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

# The parent has a context on the card, and the child before may just be giving its memory back.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")  # also the limit; 0.75 if unset

import jax

from benchmarks.figures import keep
from benchmarks.kernels import kernel_costs, table
from benchmarks.loader import make_cache
from benchmarks.train_step_sides import LATENT, WARM, Job, our_window, ours, theirs
from lfm_jax.models import forward_macs
from lfm_jax.profiling import Trace, peak_flops, stated_peak

PROFILED = 4  # steps
# XL/2 without remat keeps 0.7 GB an image: it fits in halves. With `dots`, products are kept and
# what lies between them, which costs bandwidth and no FLOPs, is computed again.
SETTINGS = "scan/cudnn/dots/1 unrolled/cudnn/dots/1 scan/cudnn/none/2 unrolled/cudnn/none/2"
SETTINGS += " unrolled/cudnn/none/1 scan/xla/dots_no_batch/1"
BOUNDS = {"DiT-XL/2 train step: MFU": 0.40, "DiT-L/2: images/s": 817}
AIMS = {"DiT-XL/2": "0.40 is 556 images/s; aim 0.50, 695", "DiT-L/2": "817 is MFU 0.40; aim 1021"}


def mfu(images_per_second: float, macs: int, peak: float) -> float:
    """Share of `peak` FLOP/s: three passes of two operations a multiply-add, none of remat's."""
    return images_per_second * 6.0 * macs / peak


def profiled(job: Job, folder: str) -> dict:
    """A trace of a few steps. Without command buffers, because a graph hides its kernels."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()
    window = our_window(job)
    window(WARM)
    trace = Trace(folder, (1, PROFILED))
    trace.before(1)
    window(PROFILED)
    trace.close()
    return {}


def alone(function: Callable[..., dict], *args) -> dict:
    """What it returns in a process of its own, or ``{"failed": why}``: most often no memory."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_guarded, function, *args).result()
    except BrokenProcessPool:
        return {"failed": "the process died"}


def _guarded(function: Callable[..., dict], *args) -> dict:
    try:
        return function(*args)
    except Exception as error:
        why = str(error).partition("\n")[0]
        return {"failed": f"{type(error).__name__}: {why}"[:300]}


def middle(found: dict) -> float:
    return statistics.median(found["rates"])


def best_setting(job: Job, settings: list[str]) -> str:
    """The fastest one in short windows."""
    rates = {}
    for setting in settings if len(settings) > 1 else ():
        found = alone(ours, replace(job, setting=setting, steps=min(job.steps, 10)))
        said = found.get("failed") or f"{middle(found):.1f} images/s"
        print(f"{job.model} {setting}: {said}", flush=True)
        if "failed" not in found:
            rates[setting] = middle(found)
    # If none ran, the measurement says once more why not.
    return max(rates, key=rates.__getitem__) if rates else settings[0]


def measure(job: Job, options: argparse.Namespace, peak: float, show: Callable) -> bool:
    """Measure one network and say whether both sides ran."""
    job = replace(job, setting=best_setting(job, options.settings))
    found: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(options.turns):
        for name, side in (("ours", ours), ("theirs", theirs))[: 2 if options.peer else 1]:
            turn = alone(side, job)
            if "failed" in turn:
                print(f"{job.model}, {name}: {turn['failed']}", flush=True)
            else:
                found[name].append(turn)
    if len(found["ours"]) < options.turns:
        return False
    rate = statistics.median(r for turn in found["ours"] for r in turn["rates"])
    gib = found["ours"][0]["memory"] / 2**30
    note = (
        f"bf16, batch {job.batch}, {job.setting} (blocks/attention/remat/accumulate), peak "
        f"{gib:.0f} GiB; loader inside; median of {2 * options.turns} windows of {job.steps} steps"
    )
    if os.environ.get("XLA_FLAGS"):
        note += f"; XLA_FLAGS {os.environ['XLA_FLAGS']}"
    told = f"{note}; {AIMS[job.model]}" if job.model in AIMS else note
    show(f"{job.model}: images/s", rate, told)
    show(f"{job.model} train step: MFU", mfu(rate, forward_macs(job.network(), LATENT), peak), told)
    whole = not options.peer or len(found["theirs"]) == options.turns
    if options.peer and whole:
        ratios = [middle(a) / middle(b) for a, b in zip(*found.values(), strict=True)]
        peer, gib = found["theirs"][0], found["theirs"][0]["memory"] / 2**30
        note += f"; PyTorch {middle(peer):.1f} images/s, {peer['parts']} part(s), {gib:.0f} GiB"
        note += f"; turns {min(ratios):.3f} to {max(ratios):.3f}"
        name = f"{job.model} train step: images/s over the compact PyTorch DiT's"
        show(name, statistics.median(ratios), note)
    if options.profile:
        folder = Path(options.profile) / job.model.replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        failed = alone(profiled, job, str(folder)).get("failed")
        print(failed or table(*kernel_costs(folder, steps=PROFILED)), flush=True)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="DiT-L/2,DiT-XL/2")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50, help="of a window; two a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--settings", nargs="+", default=SETTINGS.split())
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--profile", help="folder")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--smoke", action="store_true", help="tiny network, any device")
    options = parser.parse_args()
    if options.smoke:
        options.models, options.batch, options.steps, options.turns = "DiT-S/2", 8, 2, 1
        options.settings = ["scan/xla/none/1", "unrolled/xla/dots/2"]
    elif jax.default_backend() != "gpu":
        raise SystemExit("benchmarks.train_step_gpu: jax sees no GPU (--smoke runs without)")
    kind = jax.devices()[0].device_kind
    # The bounds are shares of this card's peak.
    bound = not options.smoke and jax.device_count() == 1 and stated_peak(kind) == 989e12
    command = " ".join(["python -m benchmarks.train_step_gpu", *sys.argv[1:]])

    def show(name: str, value: float, note: str) -> None:
        if options.no_record or not bound:
            print(f"{name}: {value:.4g} on {kind} (not recorded)  {note}", flush=True)
        else:
            asked = (">=", BOUNDS[name]) if name in BOUNDS else ("report", None)
            keep("scale", name, value, *asked, command, note)

    with tempfile.TemporaryDirectory() as folder:
        # A setting is compiled once, though tried, measured and profiled by different processes.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/programs")
        make_cache(folder, max(options.batch, 64 if options.smoke else 8192))
        jobs = [
            Job(name, "", options.batch, options.steps, f"{folder}/train", options.smoke)
            for name in options.models.split(",")
        ]
        ran = [measure(job, options, peak_flops(), show) for job in jobs]
    if not all(ran):
        raise SystemExit("benchmarks.train_step_gpu: not everything ran, see above")


if __name__ == "__main__":
    main()
