"""Readers of what a run's own files and its command line hold."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fuzz_damage import damaged, of, of_json
from benchmarks.fuzz_readers import Reader, through

ROOT = Path(__file__).resolve().parent.parent


def readers(folder: Path) -> Iterator[Reader]:
    yield from _files(folder)
    yield from _command_line()


def _files(folder: Path) -> Iterator[Reader]:
    from etils import epath

    from lfm_jax.config import default_config
    from lfm_jax.errors import UserError
    from lfm_jax.workdir import Workdir, claim, is_done, write_result
    from lfm_jax.writers import ScalarWriter

    user = (UserError,)
    config, workdir = default_config(), Workdir(epath.Path(folder / "run"))
    claim(workdir, config)
    workdir.checkpoints.mkdir()
    write_result(workdir, "train", config, {}, {"checkpoint": "0" * 64})
    valid = json.loads(workdir.config.read_text())
    read = through(Path(workdir.config), lambda path: claim(workdir, config))
    yield Reader(name="config.json", make=of_json(valid), read=read, allowed=user, share=0.3)
    path = Path(workdir.result_path("train"))
    valid = json.loads(path.read_text())
    read = through(path, lambda path: is_done(workdir, "train", {}))
    yield Reader(name="result file", make=of_json(valid), read=read, allowed=user, share=0.5)
    log = folder / "run/logs/a.jsonl"
    lines = b"".join(b'{"step": %d, "loss": 0.5}\n' % step for step in range(4))
    read = through(log, lambda path: ScalarWriter(f"{log.parent}", "a", start=9))
    # Not even that one: a log is no reason to stop.
    yield Reader(name="log", make=of(lines), read=read, allowed=(), share=0.05)


# ---- the command line

_WORDS = (
    *("", "nan", "inf", "-1", "0", "1e999", "()", "(1,'a')", "None", "True", "[[", "x y"),
    *("9" * 40, "-0.0", "('',)", "(1,)", "(0.5,2)", "none", "\x00", "é" * 300, "0x10"),
)


def _command_line() -> Iterator[Reader]:
    from lfm_jax.config import default_config
    from lfm_jax.errors import UserError

    fields: dict[str, Any] = {}
    for name, section in default_config().items():
        nested = dict(section) if hasattr(section, "items") else {"": section}
        fields |= {f"{name}.{key}".rstrip("."): value for key, value in nested.items()}

    def override(dice: random.Random) -> str:
        key = dice.choice(list(fields))
        value = _near(fields[key], dice) if dice.random() < 0.6 else dice.choice(_WORDS)
        if dice.random() < 0.05:
            key = damaged(key.encode(), dice).decode("latin1")
        return f"--config.{key}={value}"

    yield Reader(
        name="config overrides",
        make=lambda dice: [override(dice) for _ in range(dice.randint(1, 4))],
        read=_read,
        allowed=(UserError, _Refused),
        share=0.5,
    )


def _near(value: Any, dice: random.Random) -> str:
    """A value of the same kind, as one would type it."""
    if isinstance(value, bool):
        return dice.choice(["true", "false"])
    if isinstance(value, int):
        return str(dice.choice([value, value + 1, 2 * value, 8, 1, -value]))
    if isinstance(value, float):
        return str(dice.choice([value, value / 2, 0.5, 1e-3, 3.0]))
    if isinstance(value, tuple):
        return repr(dice.choice([value, value[:1], (*value, *value[-1:])]))
    return str(dice.choice([value or "a", "auto", "digits", "/tmp/a b", "8"]))


class _Refused(Exception):
    """What `lfm_jax.main` turns into one line and exit status 2."""


def _read(argv: list[str]) -> object:
    """Parse as `lfm_jax.main` does, check, and write down as a workdir does."""
    from lfm_jax.config import content_hash, to_json
    from lfm_jax.config_check import check_config
    from lfm_jax.workdir import identity

    config = _parsed(argv)
    check_config(config)
    return content_hash(to_json(config)), content_hash(identity(config))


def _parsed(argv: list[str]) -> Any:
    from absl import flags
    from ml_collections import config_flags

    argv = ["fuzz", f"--config={ROOT}/configs/digits.py", *argv]
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", flag_values=values)
    kept, sys.argv = sys.argv, argv  # ml_collections looks for overrides there, not in its argument
    try:
        values(argv)
        list(flag.value)
    except Exception as error:  # the command line catches the same there
        raise _Refused(str(error)) from None
    finally:
        sys.argv = kept
    return flag.value
