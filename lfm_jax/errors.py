"""The ways a run ends early on purpose, and their exit statuses."""

import difflib
import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

# Exit statuses that launchers rely on: only PREEMPTED is worth a rerun of the same command.
OK = 0
FAILED = 1
USER_MISTAKE = 2
PREEMPTED = 75

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class UserError(Exception):
    """A mistake in flags, config, files or data, as one line.

    The line names the culprit (key, flag or file), its value, and what is accepted.

    `lfm_jax.main` prints the message to stderr without a traceback and exits with status 2.
    """


class Failed(Exception):
    """The machine's doing and not the user's, such as a full disk, as one line: exit status 1."""


class Preempted(BaseException):
    """The machine is about to be taken away and the state has been saved: exit status 75.

    Not an `Exception`: it is raised by a signal, anywhere, and no reader that turns what a damaged
    file raises into a message may take it for damage.
    """


@contextmanager
def blaming(source: str, expected: str) -> Iterator[None]:
    """Inside, whatever is raised becomes a `UserError` that names the file.

    For the reading of other people's files alone, around what only takes them apart.

    Args:
        source: the file.
        expected: what it should be.
    """
    try:
        yield
    except UserError as error:
        if source in str(error):
            raise
        raise UserError(f"{source}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or "nothing said"
        raise UserError(f"{source}: not {expected} ({type(error).__name__}: {reason})") from error


def near(value: object, names: Iterable[str]) -> str:
    """`` (did you mean X?)`` where one of `names` is spelled much like `value`, else nothing."""
    found = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def storage_failure(error: OSError) -> str | None:
    """One line about a disk that is full, read-only, forbidden or failing; None for the rest."""
    if error.errno not in _STORAGE:
        return None
    where = error.filename2 or error.filename
    return f"{where}: {error.strerror}" if where else f"storage: {error.strerror}"


def ending(error: BaseException) -> tuple[str, int] | None:
    """Line and exit status of an end on purpose; None for what is a fault of the program."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError):
        return text, USER_MISTAKE
    if isinstance(error, Preempted):
        return text, PREEMPTED
    if isinstance(error, Failed | FloatingPointError):
        return text, FAILED
    line = storage_failure(error) if isinstance(error, OSError) else None
    return (line, FAILED) if line else None


def end(error: BaseException | str, status: int) -> NoReturn:
    """Print one line and exit."""
    print(f"lfm_jax: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(status)
