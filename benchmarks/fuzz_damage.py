"""Malformed inputs from valid ones: bytes, archives, JSON values, named tensors."""

import copy
import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np


def damaged(valid: bytes, dice: random.Random) -> bytes:
    """A copy with a few edits; one in eight is plain noise."""
    if dice.random() < 0.125:
        return dice.randbytes(dice.randrange(200))
    data = bytearray(valid)
    for _ in range(dice.randint(1, 6)):
        # Headers matter most, so half of the edits are near the front.
        place = dice.randrange((min(len(data), 64) if dice.random() < 0.5 else len(data)) or 1)
        edit = dice.randrange(5)
        if edit == 0 and data:
            data[place] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
        elif edit == 1:
            data[place:place] = dice.randbytes(dice.randint(1, 9))
        elif edit == 2:
            del data[place : place + dice.randint(1, 9)]
        elif edit == 3:  # numbers in text headers: sizes, offsets, shapes
            data[place : place + 1] = dice.choice([b"9" * 12, b"-1", b"0", b"e9", b"nan", b"'"])
        elif len(data) > 1:
            del data[place + 1 :]
        if not data:
            return b""
    return bytes(data)


def of(*valid: bytes) -> Callable[[random.Random], bytes]:
    return lambda dice: damaged(dice.choice(valid), dice)


def inside_zip(*valid: bytes) -> Callable[[random.Random], bytes]:
    """The same, and archives whose members are damaged under checksums that fit."""

    def make(dice: random.Random) -> bytes:
        chosen = dice.choice(valid)
        if dice.random() < 0.3:
            return damaged(chosen, dice)
        with zipfile.ZipFile(io.BytesIO(chosen)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        victim = dice.choice(list(members))
        members[victim] = damaged(members[victim], dice)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return buffer.getvalue()

    return make


_VALUES = [None, True, -1, 0, 1.5, 2**70, float("nan"), "", "x", "../../x", [], {}, [[]], {"a": 1}]


def mutated(valid: Any, dice: random.Random) -> Any:
    """A JSON value of which some parts are others."""
    value = copy.deepcopy(valid)
    for _ in range(dice.randint(1, 3)):
        node, key, at = None, None, value
        while isinstance(at, dict | list) and at and (node is None or dice.random() < 0.8):
            keys = list(at) if isinstance(at, dict) else range(len(at))
            node, key = at, dice.choice(list(keys))
            at = at[key]
        if node is None:
            return dice.choice(_VALUES)
        if dice.random() < 0.3:
            del node[key]
        else:
            node[key] = copy.deepcopy(dice.choice(_VALUES))
    return value


def of_json(valid: Any) -> Callable[[random.Random], bytes]:
    text = json.dumps(valid).encode()

    def make(dice: random.Random) -> bytes:
        if dice.random() < 0.3:
            return damaged(text, dice)
        return json.dumps(mutated(valid, dice)).encode()

    return make


def tensors_like(valid: dict[str, np.ndarray], dice: random.Random) -> dict[str, np.ndarray]:
    """Named tensors of which some are missing, more, of other names, shapes, kinds or values."""
    tensors = dict(valid)
    for _ in range(dice.randint(0, 3)):
        if not tensors:
            break
        # The first ones and those of short names say what the network is.
        names = sorted(tensors, key=len)
        name = dice.choice(names[:8] if dice.random() < 0.5 else names)
        value, edit = tensors[name], dice.randrange(6)
        if edit == 0:
            del tensors[name]
        elif edit == 1:
            tensors[_renamed(name, dice)] = tensors.pop(name)
        elif edit == 2:
            tensors[_renamed(name, dice)] = value
        elif edit == 3:
            tensors[name] = _reshaped(value, dice)
        elif edit == 4:
            tensors[name] = value.astype(dice.choice([np.float16, np.int64, np.uint8, np.bool_]))
        else:
            tensors[name] = np.full_like(value, dice.choice([0, np.nan, np.inf, -1e30, 7]))
    return tensors


def _renamed(name: str, dice: random.Random) -> str:
    number = re.search(r"\d+", name)
    if number and dice.random() < 0.7:
        other = dice.choice(["0", "1", "7", "99", "9" * 12, "-1", "x"])
        return re.sub(rf"\b{number[0]}(?=\b|x)", other, name)
    return dice.choice([f"x.{name}", name[1:], name.partition(".")[2], f"module.{name}", "", "a/b"])


def _reshaped(value: np.ndarray, dice: random.Random) -> np.ndarray:
    edit = dice.randrange(6)
    if edit == 0:
        return np.ravel(value)
    if edit == 1:
        return value[None]
    if edit == 2 and value.ndim:
        return value[0]
    if edit == 3 and value.ndim:
        return value[:0]
    if edit == 4 and value.ndim:
        axis = dice.randrange(value.ndim)
        return np.concatenate([value, value], axis=axis)
    return value.ravel()[0] if value.size else value
