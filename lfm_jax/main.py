"""The command line, as `lfm_jax.help` says it: flags, processes, config checks, then the job."""

import json
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from lfm_jax import errors, help

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, lock on.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_JOB = flags.DEFINE_string("job", None, "Stage to run; default: the config's job.")


def run() -> None:
    """Console entry point; the exit status is described in `lfm_jax.help`."""
    app.run(main, flags_parser=_parse_flags)


def main(_: list[str]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from lfm_jax import distributed, jobs, sharding
    from lfm_jax.config import to_json
    from lfm_jax.config_check import check_config

    config, workdir = _CONFIG.value, _WORKDIR.value
    assert workdir is not None  # `_parse_flags` has asked for it
    config.job = _JOB.value or config.job
    with distributed.one_end_for_all():
        check_config(config)
        distributed.initialize()
        distributed.agree(to_json(config), workdir)
        result = jobs.run_job(config.job, config, workdir)
        if sharding.is_main_process():
            print(json.dumps(result), flush=True)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with every mistake as one line and exit status 2."""
    if {"--help", "-h", "--helpfull"} & set(argv):
        from lfm_jax.jobs import JOBS

        job = next((a.partition("=")[2] for a in argv if a.startswith("--job=")), "")
        print(help.text({name: summary for name, (_, summary) in JOBS.items()}, job))
        sys.exit(errors.OK)
    try:
        _check_file(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise errors.UserError(f"{rest[1]!r}: expected --flag=value")
        for flag in (_CONFIG, _WORKDIR):
            if flag.value is None:
                raise errors.UserError(f"--{flag.name} is missing; see --help")
        list(_CONFIG.value)  # a file that does not load fails here and not on the first use
    except (KeyError, AttributeError) as error:  # ml_collections' word for an unknown field
        words = str(error.args[0]).replace("\\n", " ").replace("\\'", "").strip("'\"")
        errors.end(f"--config: unknown field {words}", errors.USER_MISTAKE)
    except Exception as error:  # config files are code: whatever they raise is the user's to mend
        errors.end(error, errors.USER_MISTAKE)
    logging.set_verbosity(logging.WARNING)
    return rest


def _check_file(argv: list[str]) -> None:
    """Refuse a config file that is not there with the name of one that is."""
    for argument in argv:
        if argument.startswith("--config="):
            file = Path(argument.partition("=")[2].rpartition(".py")[0] + ".py")
            if not file.is_file():
                there = {path.name: path for path in file.parent.glob("*.py")}
                raise errors.UserError(
                    f"{argument}: no such file{errors.near(file.name, there)}; expected "
                    "FILE.py[:VARIANT]"
                )


if __name__ == "__main__":
    run()
