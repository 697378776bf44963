"""The tables that readers see say what the result files say."""

import json

import pytest

from benchmarks import figures, tables


def test_readme_and_docs_are_in_step_with_the_result_files():
    stale = [
        str(page) for page in tables.pages() if tables.updated(page.read_text()) != page.read_text()
    ]
    assert not stale, f"run `python -m benchmarks.tables`: {stale}"


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
