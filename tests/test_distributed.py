"""Who belongs to a run, from the environment; and which errors mean that somebody is gone."""

import pytest

from lfm_jax import distributed, errors
from lfm_jax.errors import UserError

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, {}),
        ({"SLURM_NTASKS": "16"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, {}),
        ({"LFM_DISTRIBUTED": "1"}, {}),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (
            {**EXPLICIT, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"},
            {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_who_takes_part(environment, wanted):
    assert distributed._from_environment(environment) == wanted


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"JAX_PROCESS_ID": "2"}, ("JAX_PROCESS_ID=2", "below the count")),
        ({"JAX_PROCESS_ID": "one"}, ("JAX_PROCESS_ID=one",)),
        ({"JAX_PROCESS_ID": ""}, ("JAX_COORDINATOR_ADDRESS", "all of")),
        ({"JAX_COORDINATOR_ADDRESS": "nowhere"}, ("nowhere", "host:port")),
    ],
)
def test_a_contradictory_environment_is_named(changes, words):
    with pytest.raises(UserError) as caught:
        distributed._from_environment({**EXPLICIT, **changes})
    for word in words:
        assert word in str(caught.value)


def test_a_time_limit_is_a_number(monkeypatch):
    monkeypatch.setenv("LFM_LOST_AFTER", "soon")
    with pytest.raises(UserError, match="LFM_LOST_AFTER=soon"):
        distributed._seconds("LFM_LOST_AFTER", 60)
    monkeypatch.setenv("LFM_LOST_AFTER", "5")
    assert distributed._seconds("LFM_LOST_AFTER", 60) == 5


def test_only_errors_of_the_runtime_mean_a_lost_process():
    gone = RuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer [::1]:1")
    assert distributed._is_lost_peer(gone)
    assert not distributed._is_lost_peer(RuntimeError("shapes (3, 4) and (5,)"))
    assert not distributed._is_lost_peer(KeyError("gloo"))


@pytest.mark.parametrize(
    "error, status",
    [
        (UserError("a  b"), errors.USER_MISTAKE),
        (errors.Preempted("saved"), errors.PREEMPTED),
        (errors.Failed("full"), errors.FAILED),
        (FloatingPointError("nan"), errors.FAILED),
    ],
)
def test_ends_on_purpose_are_one_line_each(capsys, error, status):
    with pytest.raises(SystemExit) as ended, distributed.one_end_for_all():
        raise error
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"lfm_jax: {' '.join(str(error).split())}"


def test_what_is_no_end_on_purpose_is_raised_on():
    with pytest.raises(ZeroDivisionError), distributed.one_end_for_all():
        raise ZeroDivisionError
