"""Semantic boundaries on Fashion-MNIST: the edit beside every control, on images not fitted on.

    python -m benchmarks.boundary runs/fashion_mnist runs/boundary_bench

Three seeds choose images, folds and directions anew. Per seed: the mixing time by the default rule
and the strength on 64 validation images (both from the train split), then flip rate against pixel
distance on test images for the boundary and its controls: a random direction and a label-shuffled
SVM of equal step, a mean difference, the class switch and SDEdit, the last two over their time.
Every part is kept in the second folder as it ends; the same command goes on. Curves, matrix and
pictures go to docs/results/boundary/.
"""

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.boundary_across import auc_curves, leak, plain, strips
from benchmarks.boundary_bench import MATRIX, OUT, SEEDS, open_bench
from benchmarks.boundary_figures import figures
from benchmarks.boundary_parts import cross, directions, more_curves, search, spaces, turns
from lfm_jax.boundary.pictures import mixing_picture, pareto_picture
from lfm_jax.writers import write_json


def main(init: str, folder: str, *only: str) -> None:
    """Every part that is missing, then the figures; or only the parts that are named."""
    bench = open_bench(init, folder)
    OUT.mkdir(parents=True, exist_ok=True)

    def part(name: str, make: Callable[[], Any]) -> Any:
        done = (bench.workdir.root / "parts" / f"{name}.json").exists()
        return bench.part(name, make) if done or not only or name in only else None

    searches, runs = [], []
    for seed in SEEDS:
        found = part(f"search_{seed}", lambda s=seed: search(bench, s))
        if found is None:
            return
        searches.append(found)
        t = found["t"]
        run = part(f"cross_{seed}", lambda s=seed, t=t: cross(bench, s, t)) or {"methods": {}}
        more = [
            part(f"directions_{seed}", lambda s=seed, t=t: directions(bench, s, t)),
            part(f"turns_{seed}", lambda s=seed: turns(bench, s)),
        ]
        for methods in more:
            run["methods"] |= methods or {}
        runs.append(run)
    t = searches[0]["t"]
    runs[0]["methods"] |= part("spaces", lambda: spaces(bench, t)) or {}
    searches[0] |= part("more_curves", lambda: more_curves(bench)) or {}
    auc = part("auc", lambda: auc_curves(bench))
    matrix = {
        name: part(f"leak_{plain(name)}", lambda n=name: leak(bench, n, t)) for name in MATRIX
    }
    for name in MATRIX[:3]:
        part(f"strips_{plain(name)}", lambda n=name: strips(bench, n, t))
    if only:
        return
    write_json(OUT / "mixing.json", searches[0])
    write_json(OUT / "pareto.json", runs)
    write_json(OUT / "auc.json", auc)
    write_json(OUT / "leakage.json", matrix)
    drawn = dict(searches[0])
    drawn["curves"] = {**drawn["more"]["curves"], **drawn["curves"]}
    mixing_picture(OUT / "mixing.png", drawn)
    for source in ("inverted", "noised"):
        shown = {"times": auc["times"], "t": t, "curves": {"separability": auc[source]["z"]}}
        shown["layers"] = {k: v for k, v in auc[source].items() if k != "z"}
        mixing_picture(OUT / f"auc_{source}.png", shown)
    pareto_picture(OUT / "pareto.png", runs[0]["methods"], title=f"seed 0, t = {t:g}")
    figures(searches, runs, matrix)


if __name__ == "__main__":
    main(*sys.argv[1:])
