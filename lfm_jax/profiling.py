"""What the hardware could do at best: the denominator of MFU.

MFU is ``images/s * FLOPs an image / peak``, the FLOPs by the network's closed form and without
recomputation, so that it compares runs and not compilers.
"""

import functools
import time

import jax
import jax.numpy as jnp

# Dense bf16 peaks of one chip in FLOP/s, as the vendors state them.
_PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def stated_peak(device_kind: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None where it is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device_kind), None)


def peak_flops() -> float:
    """Peak FLOP/s of all devices: the stated one, or on unknown hardware that of a large matmul."""
    kind = jax.devices()[0].device_kind
    peak = stated_peak(kind)
    if peak:
        return peak * jax.device_count()
    # Virtual CPU devices share the same cores.
    return _measured_matmul() * (1 if kind == "cpu" else jax.device_count())


@functools.cache
def _measured_matmul(side: int = 2048) -> float:
    """FLOP/s of the best of five square float32 products on one device."""
    x = jnp.ones((side, side))
    matmul = jax.jit(lambda a: a @ a)
    matmul(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)
