"""Other projects' latent stores, read one by one as ours, their scaling undone.

| kind | layout | content |
|---|---|---|
| ``edm2`` | folder or zip of ``.npy`` plus ``dataset.json`` (EDM2, REPA) | mean, std ``[2c,h,w]`` |
| ``mar`` | ``class/name.npz`` (MAR) | ``moments``, ``moments_flip`` (mean, logvar) ``[2c,h,w]`` |
| ``meanflow`` | ``{index:08d}.pt`` (MeanFlow) | dict: image = mean, std ``[2c,h,w]``; label |
| ``fast_dit`` | ``*_features/{i}.npy``, ``*_labels/{i}.npy`` | a sample x 0.18215 ``[1,c,h,w]`` |

Ours is channels-last mean and log-variance, unscaled: logvar = 2 log std, and a stored sample
becomes a posterior of no width (logvar -30, the least that is stored). No pickle is executed:
``.npy`` and ``.npz`` are read without pickles, ``.pt`` with ``weights_only``.
"""

import dataclasses
import functools
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lfm_jax.data.source import hashed
from lfm_jax.errors import UserError

SD_SCALE = 0.18215
_MIN_LOGVAR = -30.0
_MAX_FILE_BYTES = 1 << 29  # a zip entry may claim any size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentStore:
    """Another project's latents, read one by one as ours.

    Attributes:
        names: of its examples.
        fingerprint: sha256 hex of names, sizes and a sample of the contents.
        read: place -> ``{"moments" f32 [h, w, 2c], "moments_flip" where stored, "label"}``.
        origin: the project, and what was undone; for the cache's metadata.
        class_names: where the store tells them, else empty.
    """

    names: list[str]
    fingerprint: str
    read: Callable[[int], dict[str, Any]]
    origin: dict[str, Any]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of an example; all are like the first."""
        first = self.read(0)
        return {k: first[k].shape for k in ("moments", "moments_flip") if k in first}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent."""
        height, width, channels = self.shapes["moments"]
        return height, width, channels // 2

    def examples(self, indices: range) -> Iterator[dict[str, Any]]:
        """The examples of a range, checked to be alike.

        Raises:
            UserError: one is damaged or of another shape, naming it.
        """
        for index in indices:
            example = self.read(index)
            for name in ("moments", "moments_flip"):
                found = np.shape(example[name]) if name in example else ()
                wanted = self.shapes.get(name, ())
                if found != wanted:
                    raise UserError(
                        f"{self.names[index]}: {name} of shape {found}; expected {wanted} as in "
                        f"{self.names[0]}"
                    )
            yield example


# ---- one function a project


def _edm2(root: Path) -> LatentStore:
    if root.is_dir():
        sizes = _listing(root, ".npy")

        def raw(name: str) -> bytes:
            return (root / name).read_bytes()
    else:
        try:
            archive = zipfile.ZipFile(root)
            if any(entry.file_size > _MAX_FILE_BYTES for entry in archive.infolist()):
                raise UserError(f"{root}: an entry unpacks to over {_MAX_FILE_BYTES} bytes")
        except UserError:
            raise
        except Exception as error:  # zipfile raises nearly anything on damaged files
            raise UserError(f"{root}: expected a folder or a zip file ({error})") from None
        sizes = {e.filename: e.file_size for e in archive.infolist() if _is(e.filename, ".npy")}
        raw = archive.read

    names = _some(sorted(sizes), root, ".npy")
    try:
        table = json.loads(raw("dataset.json")).get("labels")
        labels = {name: int(label) for name, label in table} if table else {}
    except (OSError, KeyError):
        raise UserError(f"{root}: no dataset.json beside the latents") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise UserError(f"{root}/dataset.json: not readable ({error})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{root}/dataset.json: {error}; expected labels as [file, class]") from None
    if labels:
        absent = [name for name in names if name not in labels]
        if absent:
            raise UserError(f"{root}/dataset.json: no label for {absent[0]}")

    def read(index: int) -> dict[str, Any]:
        name = names[index]
        moments = _from_mean_std(_npy(lambda: raw(name), f"{root}/{name}"), f"{root}/{name}")
        return {"moments": moments, "label": labels.get(name, -1)}

    origin = {"project": "EDM2, REPA", "statistics": "mean, std", "scale_undone": 1.0}
    return _store("edm2", root, names, sizes, read, origin)


def _mar(root: Path) -> LatentStore:
    sizes = _listing(root, ".npz")
    names = _some(sorted(sizes), root, "class/name.npz")
    flat = [name for name in names if "/" not in name]
    if flat:
        raise UserError(f"{root}/{flat[0]}: expected every file in a class folder")
    classes = {name: i for i, name in enumerate(sorted({n.split("/")[0] for n in names}))}

    def read(index: int) -> dict[str, Any]:
        name = names[index]
        where = f"{root}/{name}"
        arrays = _guarded(lambda: dict(np.load(root / name, allow_pickle=False)), where)
        if "moments" not in arrays:
            raise UserError(f"{where}: arrays {', '.join(arrays)}; expected moments")
        example: dict[str, Any] = {"label": classes[name.split("/")[0]]}
        for key in ("moments", "moments_flip"):
            if key in arrays:
                example[key] = _channels_last(arrays[key], where)
        return example

    origin = {"project": "MAR", "statistics": "mean, logvar", "scale_undone": 1.0}
    return _store("mar", root, names, sizes, read, origin, class_names=tuple(classes))


def _meanflow(root: Path) -> LatentStore:
    sizes = _listing(root, ".pt")
    names = _some(sorted(sizes), root, "{index:08d}.pt")
    try:
        import torch
    except ImportError:
        raise UserError("import meanflow: PyTorch is not installed; pip install torch") from None

    def read(index: int) -> dict[str, Any]:
        where = f"{root}/{names[index]}"
        loaded = _guarded(
            lambda: torch.load(root / names[index], map_location="cpu", weights_only=True), where
        )
        try:
            image, label = np.asarray(loaded["image"], np.float32), int(loaded["label"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{where}: {error!r}; expected a dict of image and label") from None
        return {"moments": _from_mean_std(image, where), "label": label}

    origin = {"project": "MeanFlow", "statistics": "mean, std", "scale_undone": 1.0}
    return _store("meanflow", root, names, sizes, read, origin)


def _fast_dit(root: Path) -> LatentStore:
    found = [sorted(p for p in root.glob(f"*_{part}") if p.is_dir()) for part in _FAST_DIT_PARTS]
    if any(len(folders) != 1 for folders in found):
        raise UserError(f"{root}: expected one *_features and one *_labels folder of .npy files")
    features, classes = found[0][0], found[1][0]
    sizes = _listing(features, ".npy")
    numbered = [name for name in sizes if name.removesuffix(".npy").isdecimal()]
    names = _some(sorted(numbered, key=lambda n: int(n[:-4])), features, "{i}.npy")

    def read(index: int) -> dict[str, Any]:
        name = names[index]
        where = f"{features}/{name}"
        sample = _npy(lambda: (features / name).read_bytes(), where)
        if sample.ndim != 4 or len(sample) != 1:
            raise UserError(f"{where}: shape {sample.shape}; expected [1, c, h, w]")
        mean = np.moveaxis(sample[0], 0, -1).astype(np.float32) / SD_SCALE
        label = _npy(lambda: (classes / name).read_bytes(), f"{classes}/{name}")
        if label.size != 1:
            raise UserError(f"{classes}/{name}: shape {label.shape}; expected one label")
        moments = np.concatenate([mean, np.full_like(mean, _MIN_LOGVAR)], axis=-1)
        return {"moments": moments, "label": int(label.reshape(()))}

    origin = {"project": "fast-DiT", "statistics": "one sample", "scale_undone": SD_SCALE}
    return _store("fast_dit", root, names, sizes, read, origin)


_FAST_DIT_PARTS = ("features", "labels")
KINDS = {"edm2": _edm2, "mar": _mar, "meanflow": _meanflow, "fast_dit": _fast_dit}


# ---- what they share


def _store(
    kind: str,
    root: Path,
    names: list[str],
    sizes: dict[str, int],
    read: Callable[[int], dict[str, Any]],
    origin: dict[str, Any],
    class_names: tuple[str, ...] = (),
) -> LatentStore:
    listing = [[name, sizes[name]] for name in names]
    sample = [read(i)["moments"] for i in range(0, len(names), -(-len(names) // 16))]
    return LatentStore(
        names=names,
        fingerprint=hashed(listing, *sample),
        read=read,
        origin={"kind": kind, **origin, "name": root.name},
        class_names=class_names,
    )


def _from_mean_std(array: Float[np.ndarray, "..."], where: str) -> Float[np.ndarray, "h w c"]:
    mean, std = np.split(_channels_last(array, where), 2, axis=-1)
    if not (std >= 0).all():
        raise UserError(f"{where}: negative or NaN standard deviations; expected mean and std")
    logvar = 2 * np.log(np.maximum(std, np.exp(_MIN_LOGVAR / 2)))
    return np.concatenate([mean, logvar], axis=-1)


def _channels_last(array: Any, where: str) -> np.ndarray:
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of members that are no arrays
        raise UserError(f"{where}: holds {type(array).__name__}; expected floats [2c, h, w]")
    if array.ndim != 3 or len(array) % 2 or array.dtype.kind != "f":
        raise UserError(f"{where}: {array.dtype}{array.shape}; expected floats [2c, h, w]")
    return np.moveaxis(array, 0, -1).astype(np.float32)


def _npy(data: Callable[[], bytes], where: str) -> np.ndarray:
    return _guarded(lambda: np.load(io.BytesIO(data()), allow_pickle=False), where)


def _guarded(load: Callable[[], Any], where: str) -> Any:
    try:
        return load()
    except Exception as error:  # numpy, zipfile and torch raise nearly anything on damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not readable ({reason})") from None


def _listing(root: Path, suffix: str) -> dict[str, int]:
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder")
    return {
        path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob(f"*{suffix}")
    }


def _is(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not name.startswith("__MACOSX")


def _some(names: list[str], root: Path, expected: str) -> list[str]:
    if not names:
        raise UserError(f"{root}: holds no latents; expected {expected}")
    return names
