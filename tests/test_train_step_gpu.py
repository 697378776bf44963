"""What the train step's benchmark on a GPU makes of its measurement; it needs no card."""

import gzip
import json

import pytest

from benchmarks.kernels import kernel_costs, table
from benchmarks.train_step_gpu import BOUNDS, SETTINGS, mfu
from benchmarks.train_step_sides import LATENT, Job
from lfm_jax.models import create_model, forward_macs
from lfm_jax.profiling import stated_peak


@pytest.mark.parametrize(
    ("name", "images_per_second", "share"),
    [("DiT-XL/2", 556, 0.40), ("DiT-XL/2", 695, 0.50), ("DiT-L/2", 817, 0.40)],
)
def test_the_bounds_in_images_a_second_and_in_mfu_say_the_same(name, images_per_second, share):
    macs = forward_macs(create_model(name, num_classes=1000), LATENT)
    found = mfu(images_per_second, macs, stated_peak("NVIDIA H200"))
    assert found == pytest.approx(share, rel=2e-3)
    assert BOUNDS["DiT-L/2: images/s"] == 817 and BOUNDS["DiT-XL/2 train step: MFU"] == 0.40


def test_every_setting_names_a_network_that_exists():
    for setting in SETTINGS.split():
        blocks, attention, remat, accumulate = setting.split("/")
        job = Job("DiT-XL/2", setting, 256, 1, "", tiny=False)
        network = job.network()
        assert network.scan_blocks == (blocks == "scan")
        assert (network.attention, network.remat) == (attention, remat)
        assert job.accumulate == int(accumulate) and 256 % job.accumulate == 0


def event(title, start, length, tid, pid=1, /, **args):
    times = {"ts": start, "dur": length}
    return {"ph": "X", "pid": pid, "tid": tid, "name": title, "args": args, **times}


def test_costs_are_those_of_the_streams_by_kind_of_kernel(tmp_path):
    def names(what, name, pid, tid=0):
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}

    events = [
        names("process_name", "/device:GPU:0", 1),
        names("process_name", "/host:CPU", 2),
        names("thread_name", "Stream #13(Compute)", 1, 13),
        names("thread_name", "XLA Ops", 1, 20),
        names("thread_name", "Stream #1", 2, 13),
        event("loop_fusion_3", 0, 1000, 13, name="jit(step)/mul"),
        event("loop_fusion_12", 1000, 2000, 13, name="jit(step)/add"),
        event("nvjet_sm90_128x256", 4000, 5000, 13, hlo_op="gemm.4"),
        event("nvjet_sm90_128x256", 9000, 1000, 13, hlo_op="gemm.5"),
        event("loop_fusion_3", 0, 50_000, 20),  # the same told again by operation
        event("step", 0, 50_000, 13, 2),  # on the host
        *(event(f"small{chr(97 + i)}", 10_000, 10 - i, 13) for i in range(5)),
    ]
    folder = tmp_path / "plugins/profile/now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "perfetto_trace.json.gz", "wt") as file:
        json.dump({"displayTimeUnit": "ns", "traceEvents": events}, file)
    costs, busy, span = kernel_costs(tmp_path, steps=2)
    assert [c.kernel for c in costs] == [
        "nvjet_sm90_128x256",
        "loop_fusion",
        "smalla",
        "smallb",
        "smallc",
    ]
    assert costs[0].milliseconds == 3.0 and costs[0].calls == 1 and costs[0].op == "gemm.4"
    assert costs[1].milliseconds == 1.5 and costs[1].op == "jit(step)/add"
    assert busy == pytest.approx(4.52) and span == pytest.approx(5.005)
    assert costs[0].share == pytest.approx(3 / 4.52)
    text = table(costs, busy, span)
    assert "| nvjet_sm90_128x256 | 3.00 | 66.4 % | 1 | gemm.4 |" in text
    assert text.endswith("kernels 4.5 ms of 5.0 ms a step")


def test_a_trace_without_a_gpu_is_said_to_have_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        kernel_costs(tmp_path, steps=1)
    with gzip.open(tmp_path / "a.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [event("step", 0, 1, 1, 2)]}, file)
    assert table(*kernel_costs(tmp_path, steps=1)) == "the trace has no kernel of a GPU"
