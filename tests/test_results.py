"""The evidence is consistent: every record is complete and its verdict follows from its numbers."""

import json

import pytest

from benchmarks.figures import RESULTS, TOPICS, holds

KEYS = {"name", "value", "op", "bound", "holds", "command", "device", "note"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_recorded_verdicts_follow_from_the_figures(path):
    if path.stem not in TOPICS:
        pytest.skip("a curve or an ablation, not a list of figures")
    figures = json.loads(path.read_text())["figures"]
    assert figures
    assert len({f["name"] for f in figures}) == len(figures)
    for figure in figures:
        assert set(figure) == KEYS
        assert figure["holds"] == holds(figure["value"], figure["op"], figure["bound"])


def test_a_figure_that_misses_its_bound_does_not_hold():
    assert not holds(0.9, ">=", 0.95)
    assert not holds(float("nan"), "<=", 1.0)
    assert holds(0.7, "between", [0.7, 1.2]) and not holds(1.3, "between", [0.7, 1.2])
