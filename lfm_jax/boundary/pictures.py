"""Curves as pictures, for people: the mixing time, and flips against distance."""

import io
from collections.abc import Sequence
from typing import Any

from etils import epath

from lfm_jax.writers import write_bytes


def mixing_picture(path: epath.PathLike, found: dict[str, Any]) -> None:
    """AUC over t for z and layers, and the other curves, with the chosen time marked."""
    figure, (left, right) = _axes(2)
    times, curves = found["times"], found["curves"]
    if "separability" in curves:
        left.plot(times, curves["separability"], "o-k", label="z")
    for layer, auc in found.get("layers", {}).items():
        left.plot(times, auc, ".--", label=layer)
    left.set_ylabel("AUC, cross-validated")
    left.set_ylim(min(left.get_ylim()[0], 0.9), 1.005)  # or differences of 0.1 % fill the picture
    shown = {"radius": "radius gap", "commitment": "I / H", "utility": "edit utility"}
    for name, label in shown.items():
        if name in curves:
            right.plot(times, curves[name], "o-", label=label)
    for axes in (left, right):
        axes.axvline(found["t"], color="gray", ls=":", label=f"t_m = {found['t']:g}")
        axes.set_xlabel("t (0 data, 1 noise)")
        axes.legend(fontsize=7)
    _save(figure, path)


def pareto_picture(
    path: epath.PathLike, curves: dict[str, Sequence[dict[str, float]]], *, title: str = ""
) -> None:
    """Flip rate against pixel distance, a line a method; rows as `edit_curve` gives them."""
    figure, (axes,) = _axes(1)
    for i, (name, rows) in enumerate(curves.items()):
        marker = "os^vDP*Xd"[i % 9]
        x, y = ([row[key] for row in rows] for key in ("distance", "flip_rate"))
        axes.plot(x, y, f"-{marker}", ms=4, label=name)
    axes.set_xlabel("pixel distance to the original (RMS of the full range)")
    axes.set_ylabel("flip rate by the independent classifier")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    _save(figure, path)


def _axes(count: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5.2 * count, 4.0) if count > 1 else (6.4, 4.6)
    figure, axes = plt.subplots(1, count, figsize=size, constrained_layout=True, squeeze=False)
    return figure, axes[0]


def _save(figure: Any, path: epath.PathLike) -> None:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())
