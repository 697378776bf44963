"""The command line: every mistake is one line on stderr, exit status 2, and nothing is written."""

import pytest
from checkout import ROOT

DIGITS = f"--config={ROOT}/configs/digits.py:smoke"


def _refused(done, *words):
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_help_is_short_and_names_the_jobs(command_line):
    done = command_line("--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) < 40
    for word in ("--config", "--workdir", "pipeline", "encode", "Exit status"):
        assert word in done.stdout


def test_help_of_a_job_lists_its_options():
    from lfm_jax import help
    from lfm_jax.config import default_config
    from lfm_jax.jobs import JOBS

    jobs = {name: summary for name, (_, summary) in JOBS.items()}
    config = default_config()
    for job in JOBS:
        shown = help.text(jobs, job)
        assert f"--job={job}" in shown and jobs[job] in shown
        for section in help.SECTIONS.get(job, (job,)):
            assert {name.partition(".")[2] for name, _, _ in help.options(section)} == set(
                config[section]
            ), section
    assert "--config.sample.num_steps=" in help.text(jobs, "sample")
    assert "--config.train.steps=1000\n        updates in all" in help.text(jobs, "train")


@pytest.mark.parametrize(
    "flags, words",
    [
        ((DIGITS, "--config.train.stepz=3"), ("stepz", "steps")),
        ((DIGITS, "--config.train.steps=many"), ("steps", "many")),
        ((DIGITS, "--job=trian"), ("did you mean train?", "pipeline")),
        ((f"--config={ROOT}/configs/digitz.py",), ("digitz.py", "did you mean digits.py?")),
        # Refused before anything is trained that a later stage could not use.
        ((DIGITS, "--config.sample.solver=huen"), ("sample.solver", "did you mean heun?")),
        ((DIGITS, "--config.model.name=DiT-B/3"), ("did you mean DiT-B/", "DiT-XL/2")),
        ((DIGITS, "--config.evaluate.extractor=incepton"), ("did you mean inception?",)),
        ((DIGITS, "--config.evaluate.lpips=vgg.pth"), ("evaluate.lpips=vgg.pth: no such file",)),
        ((DIGITS, "--nonsense=1"), ("nonsense",)),
        (
            (DIGITS, "--config.data.source=idx", "--config.data.path=/no/such/folder"),
            ("/no/such/folder",),
        ),
        ((DIGITS, "--config.data.num_classes=3"), ("label",)),
        ((DIGITS, "--config.mesh.fsdp=3"), ("fsdp",)),
        ((DIGITS, "--job=sample"), ("autoencode.json", "--job=autoencode")),
    ],
    ids=lambda value: " ".join(value[-2:]).replace(str(ROOT), "") if value else None,
)
def test_a_mistake_is_one_line_and_status_two(command_line, tmp_path, flags, words):
    _refused(command_line(*flags, f"--workdir={tmp_path}/run"), *words)
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left <= {"config.json"}


def test_a_missing_flag_is_named(command_line):
    _refused(command_line(DIGITS), "--workdir")
