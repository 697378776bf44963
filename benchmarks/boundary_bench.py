"""What every part of the study of semantic boundaries needs: run, judges, images, sizes."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from benchmarks.figures import RESULTS
from lfm_jax.boundary.editor import Editor
from lfm_jax.boundary.judges import Judge, class_judge, pixel_judge, split_sides, take_sides
from lfm_jax.boundary.search import Examples, examples
from lfm_jax.data import ImageSource
from lfm_jax.data.attributes import parse_attribute
from lfm_jax.experiments import neighbour
from lfm_jax.jobs import build, editing
from lfm_jax.jobs.judge import judge as open_judge
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_json

COMMAND = "python -m benchmarks.boundary runs/fashion_mnist runs/boundary_bench"
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "boundary_fashion_mnist.py"
OUT = RESULTS / "boundary"
SEEDS = (0, 1, 2)
TEST = 96  # test images a seed, half of each side
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
SWITCH_TIMES = (0.7, 0.85, 0.93, 1.0)
AUC_TIMES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
MATRIX = (
    "pair:sneaker/ankle boot",
    "pair:shirt/coat",
    "pair:pullover/dress",
    "pixels:brightness",
    "pixels:thickness",
)
STEPS = 12  # of the midpoint rule over [0, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What every part needs."""

    config: ConfigDict
    workdir: Workdir
    editor: Editor
    judges: dict[str, Judge]
    train: ImageSource
    test: ImageSource

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of a part, made once."""
        path = self.workdir.root / "parts" / f"{name}.json"
        if not path.exists():
            begin = time.perf_counter()
            write_json(path, make())
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())


def open_bench(init: str, folder: str) -> Bench:
    config = neighbour(str(CONFIG), CONFIG.name)
    config.init = init
    config.edit.num_steps = STEPS
    config.model.scan_blocks = False  # the same network, faster on a CPU
    workdir = Workdir(epath.Path(folder))
    editor = editing.make_editor(config, workdir)
    train, test = (build.images(config, split) for split in ("train", "test"))
    editing.borrow_extractors(Workdir(epath.Path(init)), workdir)
    extractor, _ = open_judge(config, workdir)
    judges = {}
    for name in MATRIX:
        attribute = parse_attribute(name)
        if attribute.kind == "pixels":
            judges[name] = pixel_judge(attribute, train)
        else:
            judges[name] = class_judge(attribute, train.class_names, extractor)
    return Bench(
        config=config, workdir=workdir, editor=editor, judges=judges, train=train, test=test
    )


def sets(bench: Bench, name: str, seed: int, tests: int = TEST) -> tuple[Examples, ...]:
    """Images to fit with, to choose with (both of the train split), and to report on."""
    judge, section = bench.judges[name], bench.config.edit
    halves = split_sides(
        judge, bench.train, count=section.num_fit, held_out=section.num_validation, seed=seed
    )
    chosen = [(bench.train, *half) for half in halves]
    chosen.append((bench.test, *take_sides(judge, bench.test, count=tests, seed=seed)))
    return tuple(
        examples(bench.editor, source.batch(indices)["image"], sides, indices)
        for source, indices, sides in chosen
    )
