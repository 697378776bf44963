"""Show this run and others side by side: grids, curves and figures with their provenance."""

from typing import Any

from ml_collections import ConfigDict

from lfm_jax.evaluate.report_html import read_run, write_compare
from lfm_jax.workdir import Workdir

_PAGE = "compare.html"


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    return {"runs": list(config.compare.runs)}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    folders = [str(workdir.root), *(run for run in config.compare.runs if run)]
    runs = [read_run(folder) for folder in folders]
    write_compare(workdir.root / _PAGE, runs)
    return {"page": _PAGE, "runs": [run.name for run in runs]}
