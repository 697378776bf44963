"""The launchers: what they would run, and what they do when a run fails or is taken away.

gcloud, srun and python are stood in for by small scripts that write down how they were called.
"""

import os
import shlex
import shutil
import subprocess

import pytest
from checkout import ROOT

LAUNCH = ROOT / "launch"
FLAGS = ("--config=configs/digits.py:smoke", "--workdir=gs://bucket/it's mine")
POD = {"TPU_NAME": "mine", "TPU_ZONE": "us-east5-a", "TPU_TYPE": "v5p-32", "TPU_VERSION": "v2-v5"}
XPK = {"XPK_CLUSTER": "c", "XPK_WORKLOAD": "mine", "XPK_TYPE": "v5p-32"}


def _run(script, *arguments, env=(), path=None):
    environment = {**os.environ, **dict(env)}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _stand_in(folder, name, body):
    """A command that appends its arguments to `calls` and then runs `body`."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
    path.chmod(0o755)
    return folder / "calls"


def test_the_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("verb", ["create", "setup", "run", "logs", "status", "retry", "delete"])
def test_a_pod_s_dry_run_shows_commands_and_calls_nothing(tmp_path, verb):
    calls = _stand_in(tmp_path, "gcloud", "exit 1")
    done = _run("tpu_pod.sh", verb, "--dry-run", "--", *FLAGS, env=POD, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not calls.exists()
    assert "gcloud compute tpus" in done.stdout and "mine" in done.stdout
    if verb in ("create", "retry"):
        assert "--accelerator-type=v5p-32" in done.stdout and "ACTIVE" in done.stdout
    if verb in ("run", "retry"):
        assert "--worker=all" in done.stdout and "run.status" in done.stdout
    if verb == "delete":
        assert "--force" in done.stdout


def test_a_pod_s_command_survives_two_shells(tmp_path):
    """What reaches python on the host are the flags as they were given, quotes and all."""
    seen = tmp_path / "seen"
    _stand_in(
        tmp_path,
        "gcloud",
        f'for a; do case $a in --command=*) echo "${{a#*=}}" > {seen};; esac; done',
    )
    done = _run("tpu_pod.sh", "run", "--", *FLAGS, env=POD, path=tmp_path)
    assert done.returncode == 0, done.stderr
    host = tmp_path / "lfm_jax"
    (host / ".venv/bin").mkdir(parents=True)
    python = host / ".venv/bin/python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nexit 75\n')
    python.chmod(0o755)
    command = seen.read_text().replace("cd lfm_jax", f"cd {host}", 1)
    command += f"while [ ! -s {host}/run.status ]; do sleep 0.05; done"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False, timeout=30)
    assert (host / "run.status").read_text().strip() == "75"
    assert (host / "run.log").read_text().splitlines() == ["-m", "lfm_jax.main", *FLAGS]


def test_a_pod_that_is_taken_away_is_made_and_run_again(tmp_path):
    """First the run is preempted, then the slice is gone, then the slice while its hosts lose each
    other, then it ends well."""
    body = f"""
cd {tmp_path}
case "$*" in
  *describe*) if [ -e there ]; then echo ACTIVE; else echo NONE; fi ;;
  *queued-resources\\ create*) touch there ;;
  *queued-resources\\ delete*) rm -f there ;;
  *nohup*) touch started ;;
  *cat\\ lfm_jax/run.status*)
    [ -e started ] || {{ echo gone; exit; }}
    echo x >> asked
    case "$(wc -l < asked)" in
      1) echo running ;;
      2) echo 75; rm there started ;;
      3) rm there started; exit 255 ;;
      4) echo 1; rm there started ;;
      *) echo 0 ;;
    esac ;;
esac"""
    calls = _stand_in(tmp_path, "gcloud", body)
    done = _run("tpu_pod.sh", "retry", "--", *FLAGS, env={**POD, "TPU_POLL": "0"}, path=tmp_path)
    assert done.returncode == 0, done.stderr
    text = calls.read_text()
    assert text.count("queued-resources create") == 4
    assert text.count("nohup") == 4
    for reason in ("75", "gone", "1, and the slice is gone"):
        assert f"preempted ({reason})" in done.stderr


def test_a_pod_whose_setup_fails_is_set_up_again_before_it_runs(tmp_path):
    body = f"""
cd {tmp_path}
case "$*" in
  *describe*) echo ACTIVE ;;
  *ensure_venv*) echo x >> setups; [ "$(wc -l < setups)" -gt 1 ] ;;
  *nohup*) wc -l < setups > ran ;;
  *cat\\ lfm_jax*) if [ -e ran ]; then echo 0; else echo gone; fi ;;
esac"""
    _stand_in(tmp_path, "gcloud", body)
    done = _run("tpu_pod.sh", "retry", "--", *FLAGS, env={**POD, "TPU_POLL": "0"}, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").read_text().strip() == "2"
    (tmp_path / "setups").unlink()
    done = _run("tpu_pod.sh", "setup", env=POD, path=tmp_path)
    assert done.returncode == 1 and "setup of mine failed" in done.stderr


def test_a_pod_s_run_that_goes_on_is_waited_for(tmp_path):
    body = f"""
cd {tmp_path}
case "$*" in
  *describe*) echo ACTIVE ;;
  *cat\\ lfm_jax*) if [ -e seen ]; then echo 0; else touch seen; echo running; fi ;;
esac"""
    calls = _stand_in(tmp_path, "gcloud", body)
    done = _run("tpu_pod.sh", "retry", "--", *FLAGS, env={**POD, "TPU_POLL": "0"}, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nohup" not in calls.read_text()


def test_a_pod_s_run_that_left_nothing_is_gone(tmp_path):
    """What host 0 is asked, on a host where none runs and no status was left."""
    seen = tmp_path / "seen"
    body = f"""
for a; do [[ $a != --command=cat* ]] || echo "${{a#*=}}" > {seen}; done
case "$*" in *describe*) echo ACTIVE ;; *cat\\ lfm_jax*) echo 0 ;; esac"""
    _stand_in(tmp_path, "gcloud", body)
    _run("tpu_pod.sh", "retry", "--", *FLAGS, env={**POD, "TPU_POLL": "0"}, path=tmp_path)
    # Another name, as this machine may be running the real one.
    command = seen.read_text().replace("fm_jax.main", "fm_jax_that_is_not_there")
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and done.stdout == ""


def test_a_pod_s_failed_run_is_not_tried_again(tmp_path):
    body = 'case "$*" in *describe*) echo ACTIVE ;; *cat\\ lfm_jax*) echo 2 ;; esac'
    calls = _stand_in(tmp_path, "gcloud", body)
    done = _run("tpu_pod.sh", "retry", "--", *FLAGS, env={**POD, "TPU_POLL": "0"}, path=tmp_path)
    assert done.returncode == 2
    assert calls.read_text().count("nohup") == 1


@pytest.mark.parametrize(
    "script, arguments, env, words",
    [
        ("tpu_pod.sh", ("fly",), POD, ("fly", "create")),
        ("tpu_pod.sh", ("create",), {}, ("TPU_NAME",)),
        ("tpu_pod.sh", ("run",), POD, ("flags",)),
        ("xpk.sh", ("create", "--", "--config=x", "--workdir=/tmp/x"), XPK, ("gs://",)),
        ("tpu_pod.sh", ("logs", "x"), POD, ("x:", "--dry-run", "number of a host")),
        ("xpk.sh", ("fly",), XPK, ("fly", "create")),
        ("xpk.sh", ("logs", "3"), XPK, ("3:", "--dry-run")),
        ("xpk.sh", ("create",), {}, ("XPK_CLUSTER",)),
        ("slurm.sbatch", (), {}, ("flags",)),
        ("multiprocess.sh", ("none",), {}, ("none", "number")),
        ("multiprocess.sh", ("2", "--devices=two", "--", "x"), {}, ("--devices=two", "number")),
        ("multiprocess.sh", ("2", "--device=2", "--", "x"), {}, ("--device=2", "--devices=D")),
    ],
)
def test_a_mistake_is_said_and_status_two(script, arguments, env, words):
    done = _run(script, *arguments, env=env)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr.splitlines()[0]


def test_xpk_restarts_on_the_one_status_that_is_worth_it(tmp_path):
    done = _run("xpk.sh", "create", "--dry-run", "--", *FLAGS, env=XPK)
    assert done.returncode == 0, done.stderr
    for word in ("workload", "--tpu-type=v5p-32", "--restart-on-exit-codes=75", "digits.py:smoke"):
        assert word in done.stdout
    for verb in ("status", "logs", "delete"):
        assert "mine" in _run("xpk.sh", verb, "--dry-run", env=XPK).stdout


def test_slurm_starts_a_task_a_gpu_and_hides_no_gpu_from_it():
    done = _run("slurm.sbatch", "--dry-run", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("srun ") and "lfm_jax.main" in done.stdout
    directives = [
        line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH --" in line
    ]
    assert any("--ntasks-per-node" in line for line in directives)
    for trap in ("--gpus-per-task", "--gpu-bind"):
        assert trap not in done.stdout and not any(trap in line for line in directives)


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (75, True)])
def test_slurm_queues_a_preempted_run_again(tmp_path, status, requeued):
    calls = _stand_in(tmp_path, "srun", f"exit {status}")
    _stand_in(tmp_path, "scontrol", "")
    env = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_LOGS": str(tmp_path)}
    done = _run("slurm.sbatch", *FLAGS, env=env, path=tmp_path)
    assert done.returncode == status
    assert ("scontrol requeue 7" in calls.read_text()) == requeued


def test_processes_dry_run_names_each(tmp_path):
    done = _run("multiprocess.sh", "3", "--devices=2", "--dry-run", "--", *FLAGS)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for i, line in enumerate(lines):
        assert f"JAX_PROCESS_ID={i} " in line and "JAX_NUM_PROCESSES=3" in line
        assert "JAX_NUM_CPU_DEVICES=2" in line and "lfm_jax.main" in line
        command = line.partition(" > ")[0]
        assert shlex.split(command)[-len(FLAGS) :] == list(FLAGS)  # as it can be pasted


@pytest.mark.parametrize(
    "statuses, wanted", [((0, 0), 0), ((0, 2), 2), ((1, 0), 1), ((75, 75), 75), ((0, 134), 1)]
)
def test_processes_end_with_the_status_that_counts(tmp_path, statuses, wanted):
    listed = " ".join(map(str, statuses))
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = -c ]; then echo 1234; exit; fi\n'
        f"echo told $JAX_PROCESS_ID; all=({listed}); exit ${{all[$JAX_PROCESS_ID]}}\n"
    )
    python.chmod(0o755)
    env = {"PYTHON": str(python), "LFM_LOST_AFTER": "1"}
    done = _run("multiprocess.sh", "2", f"--logs={tmp_path}/logs", "--", *FLAGS, env=env)
    assert done.returncode == wanted, done.stderr
    assert done.stdout == "told 0\n"
    assert (tmp_path / "logs/process_1.log").read_text() == "told 1\n"


def _pythons(folder, versions):
    """Pythons by name that know their version, write down how they are called and do no more."""
    folder.mkdir(parents=True)
    for name, version in versions.items():
        fits = 0 if version >= (3, 11) else 1
        told = "Python " + ".".join(map(str, version))
        stub = folder / name
        stub.write_text(
            "#!/usr/bin/env bash\n"
            f'case "$1" in -c) exit {fits} ;; --version) echo {told}; exit ;; esac\n'
            f'echo "{name} $*" >> calls; mkdir -p .venv/bin; cp "$0" .venv/bin/python\n'
        )
        stub.chmod(0o755)


@pytest.mark.parametrize("place", ["bin", ".local/bin"])
def test_a_newer_python_beside_an_old_one_is_found(tmp_path, place):
    old = dict.fromkeys(("python3", "python3.13", "python3.12", "python3.11"), (3, 10))
    _pythons(tmp_path / "old", old)
    (tmp_path / "setup.py").touch()
    env = {"PATH": f"{tmp_path}/old:{os.environ['PATH']}", "HOME": str(tmp_path)}
    script = ["bash", "-c", f"source {ROOT}/launch/venv.sh && ensure_venv"]
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Python 3.10 found; expected Python 3.11 to" in done.stderr
    assert not (tmp_path / ".venv").exists()
    _pythons(tmp_path / place, {"python3.12": (3, 12)})
    env["PATH"] = f"{tmp_path}/bin:{env['PATH']}"
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().startswith("python3.12 -m venv .venv\n")


def test_a_process_that_hangs_when_another_fails_is_ended(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = -c ]; then echo 1234; exit; fi\n'
        '[ "$JAX_PROCESS_ID" = 1 ] && exit 1\nexec sleep 50\n'
    )
    python.chmod(0o755)
    env = {"PYTHON": str(python), "LFM_LOST_AFTER": "1"}
    done = _run("multiprocess.sh", "2", f"--logs={tmp_path}/logs", "--", *FLAGS, env=env)
    assert done.returncode == 1
