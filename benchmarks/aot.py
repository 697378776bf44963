"""What DiT-XL/2's training step takes on TPU slices, compiled ahead of time on this host.

    python -m benchmarks.aot [--parts v5p,v5e,scaling,scaling_fsdp]

bfloat16, global batch 256, the program of `--job=train` with configs/imagenet.py:XL/2, compiled by
libtpu (pip install 'lfm_jax[tpu]'). v5p:2x2x4 and v5e:4x4: does it fit, is the state updated in
place, what do data-parallel chips send. scaling: 16 and 256 chips at the same batch a chip.

Figures go to docs/results/scale.json, everything that was measured to docs/results/scale_aot.json.
"""

import argparse
import json

import jax
from etils import epath

from benchmarks.figures import RESULTS, record
from configs import imagenet
from lfm_jax import aot
from lfm_jax.jobs import build, compile, programs
from lfm_jax.workdir import Workdir

BATCH_A_CHIP = 16
COMMAND = "python -m benchmarks.aot --parts "


def measured(topology: str, *, fsdp: int = 1, remat: str = "none") -> dict:
    """`compile.measure` of the training step at 16 images a chip."""
    config = imagenet.get_config("XL/2")
    config.mesh.fsdp = fsdp
    config.model.remat = remat
    devices = aot.topology_devices(topology)
    config.train.batch_size = BATCH_A_CHIP * len(devices)
    mesh = build.mesh(config, devices)
    step = programs.train_step(config, Workdir(epath.Path("unused")), mesh)
    figures = compile.measure(step, devices)
    figures |= {"topology": topology, "fsdp": fsdp, "remat": remat}
    print(json.dumps(figures), flush=True)
    keep(figures)
    return figures


def keep(figures: dict) -> None:
    path = RESULTS / "scale_aot.json"
    rows = json.loads(path.read_text())["programs"] if path.exists() else []
    key = ("topology", "fsdp", "remat")
    rows = [row for row in rows if [row[k] for k in key] != [figures[k] for k in key]]
    rows = sorted([*rows, figures], key=lambda row: [str(row[k]) for k in key])
    path.write_text(json.dumps({"programs": rows}, indent=1) + "\n")


def note(figures: dict) -> str:
    peak, state = (figures[k] / aot.GIB for k in ("needed", "state"))
    how = f"fsdp={figures['fsdp']}, remat={figures['remat']}"
    return f"{how}; peak {peak:.2f} GiB a chip, of it state {state:.2f}; batch 16 a chip"


def fits(topology: str, **options) -> dict:
    figures = measured(topology, **options)
    name = f"AOT DiT-XL/2 bf16, {topology}"
    command = COMMAND + topology.partition(":")[0]
    share = figures["needed"] / figures["hbm"]
    record("scale", f"{name}: memory over HBM", share, "<=", 1.0, command, note(figures))
    if "donated" in figures:
        told = "output bytes written over their input, layout padding included"
        record(
            "scale", f"{name}: donated over state", figures["donated"], ">=", 0.99, command, told
        )
    return figures


def data_parallel(figures: dict) -> None:
    """What data-parallel chips send: gradients once, and nothing else."""
    command, name = COMMAND + "v5p", f"AOT data parallel, {figures['topology']}"
    moved = figures["collectives"]
    others = sum(c["bytes"] for kind, c in moved.items() if kind != "all-reduce")
    record("scale", f"{name}: bytes of other collectives", others, "==", 0, command)
    reduced = moved["all-reduce"]
    share = reduced["elements"] / figures["parameters"]
    told = (
        f"elements summed a step over parameters; {reduced['bytes'] / aot.GIB:.2f} GiB, those of "
        "the blocks in bfloat16, in which their products come out"
    )
    record("scale", f"{name}: all-reduce over parameters", share, "between", [0.98, 1.02], command,
           told)  # fmt: skip


def scaling(small: dict, large: dict, kind: str) -> None:
    for what in ("collective_bytes", "needed"):
        words = "memory" if what == "needed" else "collective bytes"
        name = f"AOT {kind} per chip {words}, 256 over 16 chips"
        told = f"{small['topology']} to {large['topology']}, {note(large)}"
        ratio = large[what] / small[what]
        record("scale", name, ratio, "between", [0.95, 1.05], COMMAND + "scaling", told)
        print(f"{name}: {ratio:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="v5p,v5e,scaling,scaling_fsdp")
    parts = parser.parse_args().parts.split(",")
    jax.config.update("jax_platforms", "cpu")
    if "v5p" in parts:
        data_parallel(fits("v5p:2x2x4"))
    if "v5e" in parts:
        fits("v5e:4x4", fsdp=16)
    if "scaling" in parts:
        scaling(measured("v5p:2x2x4"), measured("v5p:4x8x8"), "data parallel v5p")
    if "scaling_fsdp" in parts:
        # With 8, not 16: both topologies then have a data axis, whose reduction is compared, too.
        pair = (measured("v5e:4x4", fsdp=8), measured("v5e:16x16", fsdp=8))
        scaling(*pair, "fsdp=8 v5e")


if __name__ == "__main__":
    main()
