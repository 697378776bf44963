"""All measurements that need no trained run, one after the other.

    python -m benchmarks [--dry-run] [NAME ...]

Each is a command of its own and prints how to run it alone; their figures go to docs/results/.
Those of a trained run (pipeline, conditions, mmd, boundary, trained_flow) are given its workdir.
"""

import argparse
import subprocess
import sys
import time

# name -> arguments of ``python -m benchmarks.NAME``
QUICK: dict[str, tuple[str, ...]] = {
    "train_step": (),
    "mmd_step": (),
    "loader": (),
    "sampler": (),
    "solvers": (),
    "vae": ("parity", "speed", "memory", "tiling"),
    "backbones": ("--parts", "speed,compile,parity,counts"),
    "evaluate": (),
    "mmd_cost": ("memory",),
    "aot": (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(QUICK)}; all without")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args()
    for name in options.names:
        if name not in QUICK:
            parser.error(f"{name}: expected one of {', '.join(QUICK)}")
    failed = []
    for name in options.names or QUICK:
        command = [sys.executable, "-m", f"benchmarks.{name}", *QUICK[name]]
        print("$", " ".join(["python", *command[1:]]), flush=True)
        if options.dry_run:
            continue
        begin = time.perf_counter()
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"# {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
