"""The tables that readers see say what the result files say."""

import json
import re

import pytest

from benchmarks import claims, estimates, figures, tables


def test_readme_and_docs_are_in_step_with_the_result_files():
    stale = [
        str(page) for page in tables.pages() if tables.updated(page.read_text()) != page.read_text()
    ]
    assert not stale, f"run `python -m benchmarks.tables`: {stale}"


def test_files_that_the_pages_name_are_there():
    pages = [*tables.pages(), tables.ROOT / "CONTRIBUTING.md"]
    wanted = set()
    for page in pages:
        text = page.read_text()
        wanted |= set(
            re.findall(r"\b(?:tests|configs|launch|lfm_jax|benchmarks)/[\w/]+\.\w+", text)
        )
        modules = re.findall(r"python -m ((?:benchmarks|lfm_jax)(?:\.\w+)+)", text)
        wanted |= {module.replace(".", "/") + ".py" for module in modules}
    wanted.discard("configs/NAME.py")  # whatever it is called
    assert len(wanted) > 40
    assert not [name for name in sorted(wanted) if not (tables.ROOT / name).exists()]


def test_a_table_shows_what_failed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    figures.record("vae", "a|b", 1234.5, "<=", 1000, "command")
    figures.record("vae", "in range", 0.75, "between", [0.7, 1.2], "command")
    figures.record("vae", "for information", 2, "report", None, "command")
    page = "text\n<!-- table: vae -->\nstale\n<!-- end of table -->\nmore\n"
    new = tables.updated(page)
    assert "| a\\|b | 1,234 | <= 1,000 | **no** |" in new
    assert "| in range | 0.75 | 0.7 to 1.2 | yes |" in new
    assert "| for information | 2 |  |  |" in new
    assert "stale" not in new and new.startswith("text\n") and new.endswith("more\n")
    assert tables.updated(new) == new
    written = json.loads((tmp_path / "vae.json").read_text())["figures"]
    written[0]["value"] = 999.0
    (tmp_path / "vae.json").write_text(json.dumps({"figures": written}))
    assert tables.updated(new) != new


def test_an_unknown_topic_is_refused():
    with pytest.raises(ValueError, match="expected some of pipeline"):
        tables.updated("<!-- table: nothing -->\n<!-- end of table -->")


def test_verdicts_follow_from_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    chosen = claims.Claim(
        "z",
        "words",
        "source",
        (claims.Test("mmd", "one"), claims.Test("vae", "two"), claims.Test("vae", "x", False)),
    )
    assert claims.verdict(chosen) == "not measured yet"
    figures.record("mmd", "one, first", 1, "<", 2, "command")
    assert claims.verdict(chosen).startswith("open: 1 of 1 figures hold, 1 of 2 kinds")
    figures.record("vae", "two", 3, "report", None, "command")
    assert claims.verdict(chosen) == "**holds** (1 of 1 figures hold)"
    figures.record("mmd", "one, second", 3, "<", 2, "command")
    assert claims.verdict(chosen) == "holds **in part** (1 of 2 figures hold)"
    figures.record("mmd", "one, first", 3, "<", 2, "command")
    assert claims.verdict(chosen) == "**not at this scale** (0 of 2 figures hold)"


def test_a_claims_page_shows_figures_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.record("quickstart", "claim (a): FD at 8 steps", 0.5, "<", 1.0, "command")
    end = "\n<!-- end of table -->\n"
    page = tables.updated(f"<!-- claims -->{end}<!-- claim: a -->{end}")
    assert "| (a) |" in page and "| (f) |" in page and "| not measured yet |" in page
    assert "| claim (a): FD at 8 steps | 0.5 | < 1 | yes |" in page
    assert "Not measured yet: Euler steps to the better pixel" in page
    assert tables.updated(page) == page


def test_estimates_follow_the_closed_form():
    """DiT-XL/2 as published: 118.6 G multiply-adds forward."""
    recipe = next(r for r in estimates.RECIPES if r.name == "imagenet:XL/2" and r.steps)
    flops, steps, batch = estimates.train_flops(recipe)
    assert flops == pytest.approx(6 * 118.6e9, rel=2e-3)
    seconds = flops * steps * batch / (8 * 989e12 * 0.4)
    assert estimates.hours(recipe, "8 x H200") == pytest.approx(seconds / 3600)
    assert estimates.latent_gigabytes(recipe) == pytest.approx(1_281_167 * 32 * 32 * 8 * 4 / 1e9)


def test_some_figures_are_picked_by_topic_and_name(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.record("vae", "speed of one", 2, "<=", 1, "command")
    figures.record("vae", "speed of two", 2, "report", None, "command")
    page = tables.updated("<!-- some: vae/speed of; mmd/x -->\n<!-- end of table -->\n")
    assert "| speed of one | 2 | <= 1 | **no** |" in page and "two" not in page
    with pytest.raises(ValueError, match="expected some of"):
        tables.updated("<!-- some: nothing/x -->\n<!-- end of table -->")


def test_a_picture_appears_once_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    page = "<!-- picture: pictures/one.png; what it shows -->\n<!-- end of table -->\n"
    assert "Not drawn yet: what it shows." in tables.updated(page)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").touch()
    assert "![what it shows](pictures/one.png)" in tables.updated(page)


def test_the_ablation_shows_every_row_and_leaves_gaps(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "<!-- ablation -->\n<!-- end of table -->\n"
    assert "Not measured yet." in tables.updated(page)
    rows = [
        {"N": 1, "change": "as configured", "classifier": 1.5, "accuracy": 0.9, "effnet": 45.25,
         "trained": 0.5},
        {"N": 4, "change": "cubic", "classifier": 2.0, "accuracy": 0.8, "effnet": None,
         "trained": 0.75},
    ]  # fmt: skip
    (tmp_path / "mmd").mkdir()
    (tmp_path / "mmd" / "study.json").write_text(json.dumps({"ablation": rows}))
    new = tables.updated(page)
    assert "| 1 | as configured | 1.5 | 0.9 | 45.2 | 0.5 |" in new
    assert "| 4 | cubic | 2 | 0.8 |  | 0.75 |" in new
    assert tables.updated(new) == new
