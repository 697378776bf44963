"""The claims of the three papers at a scale that runs here, each with its figures and a verdict.

    python -m benchmarks.claims [runs/fashion_mnist]

A claim is judged by figures that other scripts measured: each `Test` names them by topic and by the
beginning of their names. docs/claims.md is made of this by `python -m benchmarks.tables`, so that
no verdict says more than the figures do. Run as a script this records the two kinds of figures that
need only reading: guidance out of docs/results/fashion_mnist/solvers.json and, given a workdir that
`--job=diagnose` has been in, the terms of the Wasserstein bound.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.figures import record


@dataclasses.dataclass(frozen=True)
class Test:
    """Figures of a topic whose names begin so; `decides` if they count for the verdict."""

    topic: str
    name: str
    decides: bool = True

    def found(self) -> list[dict[str, Any]]:
        path = figures.RESULTS / f"{self.topic}.json"
        if not path.exists():
            return []
        known = json.loads(path.read_text())["figures"]
        return [figure for figure in known if figure["name"].startswith(self.name)]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is claimed, where, and what is measured of it."""

    letter: str
    words: str
    source: str
    tests: tuple[Test, ...]


CLAIMS = (
    Claim(
        "a",
        "Latent flows need fewer evaluations than pixel flows of equal compute",
        "Dao et al. 2023",
        (
            Test("quickstart", "claim (a): Euler steps to the better pixel"),
            Test("quickstart", "claim (a): Euler steps to within 10 % of its own best, latent"),
            Test("quickstart", "claim (a): evaluations of dopri5 at 1e-5"),
            Test("quickstart", "claim (a): FD at"),
            Test("quickstart", "claim (a): Euler steps that come within", decides=False),
        ),
    ),
    Claim(
        "b",
        "Class guidance on the velocity helps",
        "Dao et al. 2023",
        (Test("quickstart", "claim (b):"),),
    ),
    Claim(
        "c",
        "Inpainting and semantic synthesis work",
        "Dao et al. 2023",
        (
            Test("conditions", "inpainting: PSNR"),
            Test("conditions", "inpainting: FD"),
            Test("conditions", "inpainting: P-IDS", decides=False),
            Test("conditions", "inpainting: U-IDS", decides=False),
            Test("conditions", "inpainting: mean distance", decides=False),
            Test("conditions", "semantic: mIoU"),
            Test("conditions", "semantic: maps"),
            Test("conditions", "semantic: FD", decides=False),
        ),
    ),
    Claim(
        "d",
        "The W2 bound: which term dominates, and whether the estimate says anything",
        "Dao et al. 2023, eq. 18",
        (Test("quickstart", "claim (d):"), Test("sampling", "bound by", decides=False)),
    ),
    Claim(
        "e",
        "MMD finetuning at N <= 10 beats the un-tuned sampler; which feature space matters",
        "Aiello et al. 2023",
        (
            Test("mmd", "FD at N="),
            Test("mmd", "conditional accuracy at N="),
            Test("mmd", "finetuning at N=", decides=False),
            Test("mmd", "bias at N=", decides=False),
            Test("mmd", "2-D toy", decides=False),
        ),
    ),
    Claim(
        "f",
        "Boundaries exist at the mixing time, and a one-step crossing edits",
        "Zhu et al. 2023",
        (
            Test("boundary", "mixing time", decides=False),  # the search begins at its bound
            Test("boundary", "boundary AUC"),
            Test("boundary", "flip rate"),
            Test("boundary", "pixel distance"),
            Test("boundary", "Spearman"),
            Test("boundary", "PSNR lost"),
            Test("boundary", "leakage", decides=False),
        ),
    ),
)


def verdict(claim: Claim) -> str:
    """In a word or two what the deciding figures say; one that is missing leaves it open."""
    deciding = [test for test in claim.tests if test.decides]
    missing = [test for test in deciding if not test.found()]
    asked = [f for test in deciding for f in test.found() if f["op"] != "report"]
    if len(missing) == len(deciding):
        return "not measured yet"
    held = sum(figure["holds"] for figure in asked)
    told = f"{held} of {len(asked)} figures hold"
    if missing:
        return f"open: {told}, {len(missing)} of {len(deciding)} kinds not measured yet"
    if held == len(asked):
        return f"**holds** ({told})"
    return f"holds **in part** ({told})" if held else f"**not at this scale** ({told})"


def summary() -> Iterator[str]:
    """The table of all claims in Markdown."""
    yield "| | claim | verdict |"
    yield "|---|---|---|"
    for claim in CLAIMS:
        yield f"| ({claim.letter}) | {claim.words} ({claim.source}) | {verdict(claim)} |"


# ---- what needs only reading


def guidance() -> None:
    """(b): rows of the solver sweep that differ in the guidance alone, and in its cost too."""
    path = figures.RESULTS / "fashion_mnist" / "solvers.json"
    sweep = "python -m benchmarks.solver_sweep configs/fashion_mnist.py runs/fashion_mnist 500"
    command = f"{sweep} && python -m benchmarks.claims"
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    count = found["floors"]["count"]
    for steps in (8, 16, 50):
        free, guided = (rows[f"euler {steps}, w {scale}"] for scale in ("1", "1.5"))
        note = (
            f"guidance 1.5: FD {guided['fd']:.3f}, accuracy {guided['accuracy']:.3f}; without: "
            f"{free['fd']:.3f}, {free['accuracy']:.3f}; 2.5: "
            f"{rows[f'euler {steps}, w 2.5']['fd']:.3f}, "
            f"{rows[f'euler {steps}, w 2.5']['accuracy']:.3f}; {count} samples"
        )
        name = f"claim (b): FD with guidance 1.5 over that without, {steps} Euler steps"
        record("quickstart", name, guided["fd"] / free["fd"], "<", 1.0, command, note)
        name = f"claim (b): accuracy gained by guidance 1.5, {steps} Euler steps"
        gained = guided["accuracy"] - free["accuracy"]
        record("quickstart", name, gained, ">", 0.0, command, note)
    guided, free = rows["euler 8, w 1.5"], rows["euler 16, w 1"]
    record(
        "quickstart", "claim (b): FD with guidance 1.5 over that without, 16 network calls each",
        guided["fd"] / free["fd"], "<", 1.0, command,
        f"8 guided steps {guided['fd']:.3f}, 16 plain ones {free['fd']:.3f}; {count} samples",
    )  # fmt: skip


def bound(folder: str) -> None:
    """(d): the terms of the bound on a trained flow, in natural logarithms."""
    result = json.loads((Path(folder) / "results" / "diagnose.json").read_text())
    terms = result["bound"]
    command = (
        "python -m lfm_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist "
        "--job=diagnose && python -m benchmarks.claims runs/fashion_mnist"
    )
    told = f"{result['num_images']} held-out images; "
    sides = terms["estimates"]
    out = figures.RESULTS / "fashion_mnist" / "bound.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(terms, indent=1) + "\n")
    for name, key in (
        ("the autoencoder's error", "autoencoder_error"),
        ("the velocity's error", "velocity_error"),
    ):
        # The log of the root: what enters the bound.
        value = 0.5 * math.log(terms[key])
        note = told + sides[key] + f"; mean square {terms[key]:.3f}"
        record("quickstart", f"claim (d): log of {name}", value, "report", None, command, note)
    record(
        "quickstart", "claim (d): log of the decoder's Lipschitz constant",
        math.log(terms["decoder_lipschitz"]), "report", None, command,
        told + sides["decoder_lipschitz"],
    )  # fmt: skip
    exponents = {
        "sup_lipschitz": "the velocity's Lipschitz constant",
        "int_one_sided": "its one-sided constant along the way",
    }
    for constant, words in exponents.items():
        note = f"{told}{sides['velocity_lipschitz']}; dominating: {terms[constant]['dominating']}"
        name, value = f"claim (d): exponent by {words}", terms[constant]["exponent"]
        record("quickstart", name, value, "report", None, command, note)
    limit = math.log(terms["diameter"])
    for constant, words in (
        ("sup_lipschitz", "the Lipschitz constant of the paper"),
        ("int_one_sided", "the one-sided constant along the way"),
    ):
        found = terms[constant]
        record(
            "quickstart", f"claim (d): log of the bound less that of the data's diameter, {words}",
            found["log_bound"] - limit, "<", 0.0, command,
            f"{told}{found['verdict']}; exponent {found['exponent']:.2f}; log diameter {limit:.2f}",
        )  # fmt: skip


def main(arguments: list[str]) -> None:
    guidance()
    if arguments:
        bound(arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
