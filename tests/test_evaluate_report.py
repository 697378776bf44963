"""The comparison page is one valid file that shows every run and warns of mixed conditions."""

import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from lfm_jax.errors import UserError
from lfm_jax.evaluate.report_html import RunSummary, compare_html, read_run, write_compare

VOID = {"meta", "img", "line", "polyline", "br"}


class Checker(html.parser.HTMLParser):
    """Collects tags and text, and fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parse(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return checker


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def run(name, pipeline="tf1", **figures) -> RunSummary:
    figures = {"FID": 3.2, "pipeline": pipeline, "sampler": {"nfe": 50}, **figures}
    curves = {"FID over NFE": [(1, 300.0), (8, 12.0), (50, 3.2)], "FID over step": [(0, 5.0)]}
    return RunSummary(name=name, figures=figures, grid=png(), curves=curves)


def test_page_shows_grids_curves_and_figures_without_loading_anything():
    page = compare_html([run("a"), run("b <&>", FID=4.5)])
    checker = parse(page)
    tags = [tag for tag, _ in checker.tags]
    assert tags.count("img") == 2 and tags.count("svg") == 2 and tags.count("circle") == 8
    assert "script" not in tags and "link" not in tags
    assert all(a.get("src", "data:").startswith("data:") for _, a in checker.tags)
    words = " ".join(checker.words)
    assert "sampler.nfe" in words and "b <&>" in words and "Not comparable" not in words
    heights = [float(a["cy"]) for tag, a in checker.tags if tag == "circle"][:3]
    assert heights == sorted(heights)  # a falling curve falls on the page: y grows downwards


def test_mixed_pipelines_stand_under_a_warning():
    words = parse(compare_html([run("a"), run("b", pipeline="torch")])).words
    assert "Not comparable:" in words


def test_runs_are_read_from_their_folders(tmp_path):
    folder = tmp_path / "first"
    (folder / "results").mkdir(parents=True)
    (folder / "samples").mkdir()
    with pytest.raises(UserError, match=r"no results/evaluate.json"):
        read_run(folder)
    (folder / "results" / "evaluate.json").write_text(json.dumps({"FID": 2.0}))
    (folder / "results" / "curves.json").write_text(json.dumps({"FID over NFE": [[1, 2], [4, 1]]}))
    (folder / "samples" / "grid.png").write_bytes(png())
    summary = read_run(folder)
    assert summary.name == "first" and summary.curves == {"FID over NFE": [(1.0, 2.0), (4.0, 1.0)]}
    write_compare(tmp_path / "page.html", [summary])
    assert "FID over NFE" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match=r"compare\.runs: none"):
        write_compare(tmp_path / "none.html", [])
    assert not (tmp_path / "none.html").exists()
