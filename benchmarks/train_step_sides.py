"""The two sides of `benchmarks.train_step_gpu`: our whole train step and PyTorch's, by windows.

Both read the real loader, draw posterior, noise, times and dropped labels on the device, and end a
step with AdamW and an average of the parameters. Each is meant for a process of its own.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from lfm_jax import sharding
from lfm_jax.data import latent_batches, open_cache, prefetch
from lfm_jax.flow import flow_matching_loss
from lfm_jax.models import create_model, init_params
from lfm_jax.optim import adamw, learning_rate
from lfm_jax.state import create_state, make_step

LATENT, CLASSES, WARM = (32, 32, 4), 1000, 4
TINY = {"hidden": 64, "depth": 2, "heads": 2}


@dataclass(frozen=True)
class Job:
    """What one process measures; a setting is ``blocks/attention/remat/accumulate``."""

    model: str
    setting: str
    batch: int
    steps: int
    cache: str
    tiny: bool
    windows: int = 2

    @property
    def accumulate(self) -> int:
        return int(self.setting.split("/")[3])

    def network(self):
        blocks, attention, remat, _ = self.setting.split("/")
        return create_model(
            self.model,
            num_classes=CLASSES,
            dtype="bfloat16",
            scan_blocks={"scan": True, "unrolled": False}[blocks],
            attention=attention,
            remat=remat,
            **(TINY if self.tiny else {}),
        )

    def batches(self) -> Iterator[dict]:
        return latent_batches(open_cache(self.cache), global_batch=self.batch, seed=0)


def timed(window: Callable[[int], float], job: Job) -> list[float]:
    """Images a second of each window, after one that compiles and fills the loader."""
    window(WARM)
    rates = []
    for _ in range(job.windows):
        begin = time.perf_counter()
        loss = window(job.steps)
        rates.append(job.batch * job.steps / (time.perf_counter() - begin))
        if not math.isfinite(loss):  # a step that computes nothing right is no speed
            raise RuntimeError(f"loss {loss}")
    return rates


def our_window(job: Job) -> Callable[[int], float]:
    """``window(steps) -> loss`` of our train step; it returns when all steps are done."""
    mesh, key, model = sharding.make_mesh(), jax.random.key(0), job.network()
    tx = adamw(learning_rate(1e-4, steps=10_000))
    state = create_state(lambda: init_params(model, key, LATENT), tx, mesh, ema=True)
    loss = flow_matching_loss(model, scale=1.0, num_classes=CLASSES)
    step = make_step(loss, tx, key, ema_decay=0.9999, accumulate=job.accumulate, like=state)
    batches = prefetch(job.batches(), sharding.batch_sharding(mesh))

    def window(steps: int) -> float:
        nonlocal state
        metrics = {}
        for batch in itertools.islice(batches, steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"])

    return window


def ours(job: Job) -> dict:
    rates = timed(our_window(job), job)
    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    return {"rates": rates, "memory": stats.get("peak_bytes_in_use", 0)}


def theirs(job: Job) -> dict:
    """PyTorch's, in as few parts of the batch as the card's memory takes."""
    import torch

    def tried(parts: int) -> list[float] | None:
        try:
            return timed(their_window(job, parts), job)
        except torch.OutOfMemoryError:
            return None

    for parts in (1, 2, 4, 8):
        if rates := tried(parts):
            memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            return {"rates": rates, "memory": memory, "parts": parts}
        torch.compiler.reset()  # compiled functions hold on to the network
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError("does not fit in eight parts either")


def their_window(job: Job, parts: int) -> Callable[[int], float]:
    import torch

    from benchmarks.torch_dit import DiT

    cuda, like = torch.cuda.is_available(), job.network()
    device = "cuda" if cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    network = DiT(like.hidden, like.depth, like.heads, like.patch, num_classes=CLASSES).to(device)
    params = list(network.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
    batches = job.batches()

    def objective(moments, label):
        mean, logvar = moments.float().chunk(2, -1)
        x0 = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        noise, t = torch.randn_like(x0), torch.rand(len(x0), device=x0.device)
        label = torch.where(torch.rand_like(t) < 0.1, CLASSES, label)
        s = t[:, None, None, None]
        velocity = network((1 - s) * x0 + s * noise, t, label)
        return ((velocity.float() - (noise - x0)) ** 2).mean()

    if cuda:
        objective = torch.compile(objective)

    def placed(array):
        tensor = torch.tensor(array)  # the loader's arrays are not to be written to
        return tensor.pin_memory().to(device, non_blocking=True) if cuda else tensor

    def window(steps: int) -> float:
        for batch in itertools.islice(batches, steps):
            moments, label = placed(batch["moments"]), placed(batch["label"]).long()
            optimizer.zero_grad()
            for part in zip(moments.chunk(parts), label.chunk(parts), strict=True):
                with torch.autocast(device, torch.bfloat16):
                    loss = objective(*part) / parts
                loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1e-4)
        return float(loss.detach())  # waits for the device

    return window
