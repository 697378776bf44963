"""Run the notebooks of docs/notebooks and keep what they print and draw in them.

    python -m benchmarks.notebooks [NAME ...]

The cells of a notebook are plain Python, run from top to bottom in an empty folder; nothing of
Jupyter is needed. Figures that are open at the end of a cell become its pictures.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS

FOLDER = RESULTS.parent / "notebooks"


def code_of(cell: dict[str, Any]) -> str:
    """The cell's text, whichever of the format's two forms it has."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Execute the code cells in the working directory and fill in their outputs.

    Returns:
        The names that the notebook leaves behind.
    """
    import matplotlib

    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        cell["execution_count"] = count
        cell["outputs"] = _run_cell(code_of(cell), namespace, count)
    return namespace


def _run_cell(code: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    import matplotlib.pyplot as plt

    tree, last = ast.parse(code), None
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";"):
        last = ast.Expression(tree.body.pop().value)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"<cell {count}>", "exec"), namespace)
        value = None if last is None else eval(compile(last, f"<cell {count}>", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(text)})
    for number in plt.get_fignums():
        outputs.append(_picture(plt.figure(number)))
    plt.close("all")
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": count,
                "data": data,
                "metadata": {},
            }
        )
    return outputs


def _picture(figure: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["a picture"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(names: list[str]) -> None:
    paths = [FOLDER / f"{Path(name).stem}.ipynb" for name in names] or sorted(
        FOLDER.glob("*.ipynb")
    )
    os.environ.setdefault("TQDM_DISABLE", "1")
    for path in paths:
        notebook = json.loads(path.read_text())
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as empty:
            os.chdir(empty)
            try:
                run(notebook)
            finally:
                os.chdir(here)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
