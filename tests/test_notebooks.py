"""The notebooks run from top to bottom on what they name, and are kept with their outputs."""

import json
import os

import pytest

from benchmarks import notebooks

NAMES = ("digits_to_few_steps", "load_release")


def saved(name: str) -> dict:
    return json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())


@pytest.fixture
def ran(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(notebooks.FOLDER.parent.parent))

    def run(name):
        notebook = saved(name)
        return notebook, notebooks.run(notebook)

    return run


def test_all_notebooks_are_tested_and_keep_their_outputs():
    assert sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        cells = [cell for cell in saved(name)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert sum(bool(cell["outputs"]) for cell in cells) >= 5


def test_from_digits_to_two_steps(ran):
    notebook, names = ran("digits_to_few_steps")
    few, tuned = names["found"]["euler, 2 steps"], names["found"]["finetuned, 2 steps"]
    assert few["calls"] == tuned["calls"] == 2
    assert tuned["FD"] < 0.85 * few["FD"]
    assert tuned["accuracy"] > 0.9
    pictures = [
        output
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2


def test_a_release_opens_without_the_package(ran):
    code = "\n".join(
        notebooks.code_of(cell)
        for cell in saved("load_release")["cells"]
        if cell["cell_type"] == "code"
    )
    opening = code[: code.index("from lfm_jax import")]
    assert "import lfm_jax" not in opening
    _, names = ran("load_release")
    assert names["params"]["labels"]["embedding"].shape == (11, 32)
    assert names["latents"].shape == (4, 8, 8, 1)
    assert os.path.exists("run/release/params.safetensors")


def test_an_error_in_a_cell_is_the_readers_to_see(tmp_path):
    cell = {"cell_type": "code", "source": ["x = 1\n", "x / 0"], "outputs": []}
    with pytest.raises(ZeroDivisionError):
        notebooks.run({"cells": [cell]})
