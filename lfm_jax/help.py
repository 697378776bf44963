"""What ``--help`` prints: the flags, the jobs, and with ``--job`` the options that job reads.

The options' words are the comments of `lfm_jax.config.default_config`: they are said once.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator, Mapping

from lfm_jax import config as config_lib

USAGE = """Latent flow matching: train, sample and measure.

  python -m lfm_jax.main --config=configs/digits.py --workdir=runs/digits

  --config=FILE[:VARIANT]   an experiment of configs/; configs/base.py lists every field
  --config.KEY=VALUE        override one field, e.g. --config.train.steps=500
  --workdir=DIR             where the run lives; the same command goes on where it stopped
  --job=JOB                 one stage instead of the config's own job; with --help its options:
{jobs}

Exit status: 0 done, 2 a mistake in flags or input, 75 preempted after saving (rerun), 1 the rest.
"""
# The sections of the config that a job is about, beside data and mesh, which most of them read.
SECTIONS = {
    "pipeline": (),
    "autoencode": ("autoencoder",),
    "encode": ("encode", "autoencoder"),
    "train": ("train", "model", "condition", "mmd"),
    "sample": ("sample",),
    "evaluate": ("evaluate",),
    "compile": ("compile", "mesh"),
}


def text(jobs: Mapping[str, str], job: str = "") -> str:
    """The help of the command line, or of one of `jobs` (name -> what it does in a line)."""
    if job not in jobs:
        lines = "\n".join(f"      {name:<12}{summary}" for name, summary in jobs.items())
        return USAGE.format(jobs=lines)
    sections = SECTIONS.get(job, (job,))
    lines = [
        f"{job}: {jobs[job]}",
        "",
        f"  python -m lfm_jax.main --config=FILE --workdir=DIR --job={job}",
    ]
    for section in sections:
        lines.append("")
        lines += [
            f"  --config.{name}={default}" + (f"\n        {words}" if words else "")
            for name, default, words in options(section)
        ]
    if not sections:
        lines += ["", "Its options are those of its stages: --job=STAGE --help."]
    return "\n".join(lines)


def options(section: str) -> Iterator[tuple[str, str, str]]:
    """(name, default, comment) of every field of a section, as `default_config` writes them."""
    source = inspect.getsource(config_lib.default_config)
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # A comment on a line of its own speaks of the fields below it, not of one.
        if token.type == tokenize.COMMENT and token.line.strip() != token.string:
            comments[token.start[0]] = token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        name = ast.unparse(node.targets[0]).removeprefix("config.")
        if name.partition(".")[0] != section or "." not in name:
            continue
        default = ast.unparse(node.value)
        if default.startswith("placeholder("):
            default = default[len("placeholder(") : -1].upper()
        last = node.end_lineno or node.lineno
        words = " ".join(comments[n] for n in range(node.lineno, last + 1) if n in comments)
        yield name, default.strip("'"), words
