"""References read from and written to files, everybody's.

Every format that the field hands around is recognised by its keys:

==============  ====================================================  ===========================
format          keys                                                  pixels
==============  ====================================================  ===========================
``lfm_jax``     ``mu sigma [mu_s sigma_s arr_0 feats] lfm_jax``       recorded in the file
``adm``         ``mu sigma mu_s sigma_s [arr_0]`` or ``arr_0`` alone  ``tf1``
``meanflow``    ``ref_mu ref_sigma``                                  ``tf1``
``edm2``        ``.pkl``: ``{"fid": {mu, sigma}, "fd_dinov2": ...}``  ``tf1``; DINOv2 ``bicubic``
``lfm``         ``.npy`` of a dict ``{mu, sigma}``                    ``torch``, JPEG images
``moments``     ``mu sigma``: pytorch-fid, clean-fid or EDM           not said: must be given
``features``    ``feats``: clean-fid's KID                            not said: must be given
==============  ====================================================  ===========================

The pickles are read by an unpickler that knows numpy arrays alone.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import pickletools
import zipfile
from typing import Any

import numpy as np
from etils import epath

from lfm_jax.errors import UserError
from lfm_jax.evaluate.reference import ACCEPTED, Reference
from lfm_jax.evaluate.samples import check_images
from lfm_jax.evaluate.statistics import FeatureStatistics
from lfm_jax.features.dino import dino_pipeline
from lfm_jax.features.inception import inception_pipeline
from lfm_jax.writers import write_bytes

FORMATS = ("lfm_jax", "adm", "moments", "meanflow", "edm2", "features")
_MAX_DIM = 1 << 14  # of features: their covariance has the square of it
_MAX_BYTES = 1 << 33  # ADM's 10,000 images of 256 pixels are 2 GB


def read_reference(path: str | os.PathLike, *, pipeline: str = "") -> Reference:
    """Read a reference of any known format.

    Args:
        pipeline: what made an Inception reference that does not say so: tf1, torch or clean.

    Raises:
        UserError: missing, not readable, of no known format, or inconsistent in its shapes.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"evaluate.reference {path}: no such file; {ACCEPTED}")
    data = path.read_bytes()
    try:
        reference = _recognise(_arrays(data), str(path))
        _check_arrays(reference)
    except UserError:
        raise
    # numpy, zipfile and the unpickler raise nearly anything on damaged files.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"evaluate.reference {path}: {reason}; {ACCEPTED}") from error
    if pipeline and not reference.pipeline:
        reference = dataclasses.replace(reference, pipeline=inception_pipeline(pipeline))
    _check_shapes(reference, str(path))
    provenance = reference.provenance | {
        "file": path.name,
        "file_sha256": hashlib.sha256(data).hexdigest(),
    }
    return dataclasses.replace(reference, provenance=provenance)


def _arrays(data: bytes) -> dict[str, Any]:
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > _MAX_BYTES:
            raise ValueError(f"unpacks to {claimed} bytes; at most {_MAX_BYTES} are read")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    if data[:6] == b"\x93NUMPY":
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            header = np.lib.format.read_array_header_2_0
        if header(stream)[2] != np.dtype(object):
            raise ValueError("a bare array")
        content = _unpickled(stream.read())
        return {"lfm": content.item() if isinstance(content, np.ndarray) else content}
    return {"edm2": _unpickled(data)}


def _unpickled(data: bytes) -> Any:
    """What a pickle of numpy arrays holds.

    The unpickler allocates what a few bytes claim: a length, or a place in its memo. Both are held
    against the file first; lengths by `pickletools`, which reads them.
    """
    for opcode, argument, _ in pickletools.genops(data):
        puts = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if puts and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError(f"place {argument} of its memo, in {len(data)} bytes")
    return NumpyUnpickler(io.BytesIO(data)).load()


class NumpyUnpickler(pickle.Unpickler):
    """Unpickles containers and numpy arrays; anything else that would be called is refused."""

    NAMES = ("_reconstruct", "scalar", "_frombuffer", "ndarray", "dtype")
    MODULES = ("numpy", "numpy._core.multiarray", "numpy._core.numeric")

    def find_class(self, module: str, name: str) -> Any:
        renamed = module.replace("numpy.core.", "numpy._core.")
        if renamed in self.MODULES and name in self.NAMES:
            return super().find_class(renamed, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which a reference has no need of")


def _recognise(arrays: dict[str, Any], path: str) -> Reference:
    names = set(arrays)
    tf1 = inception_pipeline("tf1")
    moments: dict[str, Any]
    if "lfm_jax" in names:
        record = json.loads(str(arrays["lfm_jax"]))
        moments = {k: arrays.get(k) for k in ("mu", "sigma", "mu_s", "sigma_s")}
        return Reference(
            **moments,
            features=arrays.get("feats"),
            images=arrays.get("arr_0"),
            pipeline=record["pipeline"],
            count=record["count"],
            provenance=record["provenance"],
        )
    if {"mu_s", "sigma_s"} & names or names & {"arr_0"}:
        moments = {k: arrays.get(k) for k in ("mu", "sigma", "mu_s", "sigma_s")}
        return Reference(**moments, images=arrays.get("arr_0"), format="adm", pipeline=tf1)
    if {"ref_mu", "ref_sigma"} <= names:
        moments = {"mu": arrays["ref_mu"], "sigma": arrays["ref_sigma"]}
        return Reference(**moments, format="meanflow", pipeline=tf1)
    if "edm2" in names and isinstance(arrays["edm2"], dict):
        table = arrays["edm2"]
        for key, pipeline in (("fid", tf1), ("fd_dinov2", dino_pipeline())):
            if key in table:
                moments = {k: table[key].get(k) for k in ("mu", "sigma")}
                return Reference(**moments, format="edm2", pipeline=pipeline)
    if "lfm" in names and isinstance(arrays["lfm"], dict):
        moments = {k: arrays["lfm"].get(k) for k in ("mu", "sigma")}
        return Reference(
            **moments,
            format="lfm",
            pipeline=inception_pipeline("torch"),
            provenance={"jpeg_quality": 75},
        )
    if {"mu", "sigma"} <= names:
        return Reference(mu=arrays["mu"], sigma=arrays["sigma"], format="moments")
    if "feats" in names:
        features = np.asarray(arrays["feats"], np.float32)
        if features.ndim != 2 or features.shape[1] > _MAX_DIM:
            raise ValueError(f"feats has shape {features.shape}, expected [n, d]")
        statistics = FeatureStatistics.of(features)
        return Reference(
            mu=statistics.mean,
            sigma=statistics.covariance,
            features=features,
            count=len(features),
            format="features",
        )
    raise UserError(f"evaluate.reference {path}: holds {', '.join(sorted(names))}; {ACCEPTED}")


def _check_arrays(reference: Reference) -> None:
    """`ValueError` for what are no arrays of numbers."""
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        value = getattr(reference, name)
        if value is not None and not (isinstance(value, np.ndarray) and value.dtype.kind in "fiu"):
            raise ValueError(f"{name} is {getattr(value, 'dtype', type(value).__name__)}")
    images = reference.images
    if images is not None and not isinstance(images, np.ndarray):
        raise ValueError(f"arr_0 is {type(images).__name__}")
    if not isinstance(reference.provenance, dict) or type(reference.count) is not int:
        raise ValueError("its record lacks provenance and count")


def _check_shapes(reference: Reference, path: str) -> None:
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        mu, sigma = getattr(reference, mean), getattr(reference, covariance)
        if mu is None and sigma is None:
            continue
        if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            shapes = [None if a is None else list(a.shape) for a in (mu, sigma)]
            raise UserError(
                f"evaluate.reference {path}: {mean} {shapes[0]}, {covariance} {shapes[1]}; "
                "accepted: [d] and [d, d]"
            )
    if reference.images is not None:
        check_images(reference.images, f"evaluate.reference {path}: arr_0")


# ---- writing


def write_reference(
    path: str | os.PathLike, reference: Reference, *, format: str = "lfm_jax"
) -> None:
    """Write a reference for this evaluator or another's, all or nothing.

    Args:
        format: ``lfm_jax`` (everything; pytorch-fid, clean-fid, EDM and, with spatial statistics,
            ADM's evaluator read it too), ``adm``, ``moments``, ``meanflow``, ``edm2`` or
            ``features``.

    Raises:
        UserError: unknown format, or the reference lacks what it holds.
    """
    if format not in FORMATS:
        raise UserError(f"reference.format: {format!r}; accepted: {', '.join(FORMATS)}")
    held = {
        "mu": reference.mu,
        "sigma": reference.sigma,
        "mu_s": reference.mu_s,
        "sigma_s": reference.sigma_s,
        "arr_0": reference.images,
        "feats": reference.features,
    }
    required = {
        "lfm_jax": (),
        "adm": ("mu", "sigma", "mu_s", "sigma_s"),
        "features": ("feats",),
    }.get(format, ("mu", "sigma"))
    missing = [name for name in required if held[name] is None]
    if missing:
        raise UserError(f"reference.format {format}: needs {', '.join(missing)}, not collected")
    wanted = (*required, "arr_0") if format == "adm" else required or tuple(held)
    arrays: dict[str, Any] = {k: held[k] for k in wanted if held[k] is not None}
    buffer = io.BytesIO()
    if format == "edm2":
        key = "fid" if reference.pipeline != dino_pipeline() else "fd_dinov2"
        pickle.dump({key: arrays}, buffer)
    else:
        if format == "meanflow":
            arrays = {f"ref_{k}": v for k, v in arrays.items()}
        if format == "lfm_jax":
            record = {k: getattr(reference, k) for k in ("pipeline", "count", "provenance")}
            arrays["lfm_jax"] = np.array(json.dumps(record))
        np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
