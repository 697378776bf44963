"""A boundary as a file, with what it belongs to: it is refused everywhere else.

A hyperplane of another network, time or layer has a shape that fits and a meaning that does not, so
nothing would fail and every edit would be noise. The file holds arrays and JSON, no pickled object.
"""

import io
import json
from typing import Any

import numpy as np
from etils import epath

from lfm_jax.boundary.hyperplane import Boundary
from lfm_jax.errors import UserError
from lfm_jax.writers import write_bytes

_FIELDS = ("offset", "spread", "shape", "method", "cost", "score", "provenance")


def save_boundary(path: epath.PathLike, boundary: Boundary) -> None:
    """Write `boundary` whole to an ``.npz`` file."""
    described = {name: getattr(boundary, name) for name in _FIELDS}
    buffer = io.BytesIO()
    np.savez(buffer, normal=boundary.normal, described=np.array(json.dumps(described)))
    write_bytes(path, buffer.getvalue())


def load_boundary(path: epath.PathLike, *, expected: dict[str, Any] | None = None) -> Boundary:
    """The boundary that `save_boundary` wrote.

    Args:
        path: the file.
        expected: entries that its provenance must have: model, t, space ...

    Raises:
        UserError: no such file, one that is not a boundary, or one that belongs elsewhere (the
            message names the entry, what it is there and what it is here).
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            described = json.loads(str(arrays["described"]))
            normal = arrays["normal"]
        boundary = Boundary(
            normal=normal,
            **{**{name: described[name] for name in _FIELDS}, "shape": tuple(described["shape"])},
        )
    except OSError as error:
        raise UserError(f"boundary {path}: {error.strerror or error}; expected a file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"boundary {path}: not readable ({type(error).__name__}); "
            "expected an .npz that the edit job wrote"
        ) from None
    check_provenance(boundary, expected or {}, where=f"boundary {path}")
    return boundary


def check_provenance(boundary: Boundary, expected: dict[str, Any], *, where: str) -> None:
    """Raise a `UserError` where the boundary belongs to something else than `expected`."""
    for name, here in expected.items():
        there = boundary.provenance.get(name)
        same = there == here
        if isinstance(here, float) and isinstance(there, float):
            same = abs(there - here) < 1e-6
        if not same:
            raise UserError(f"{where}: it was fitted with {name} {there!r}, here it is {here!r}")
