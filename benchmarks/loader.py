"""How fast do latents reach the training loop? Two modes, 16 KiB records, batching included.

    python -m benchmarks.loader            20,480 records of [32, 32, 8] float16, batches of 256
    python -m benchmarks.loader --records 512 --no-record       a smoke run

Random access reads shuffled records from ArrayRecord shards through grain; in-memory gathers from
the cache held in host memory. Both are counted at the iterator's end: shuffled, parsed, stacked.
The files are in the page cache, as they are for any cache smaller than memory after one epoch.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import numpy as np

from benchmarks.figures import record
from lfm_jax.data import CacheWriter, LatentCache, latent_batches

BATCH = 256
REPEATS = 5
COMMAND = "python -m benchmarks.loader"


def make_cache(folder: str, records: int) -> LatentCache:
    random = np.random.default_rng(0)
    noise = random.standard_normal((256, 32, 32, 8), np.float32).astype(np.float16)
    writer = CacheWriter(
        f"{folder}/train",
        num_examples=records,
        shard_size=max(records // 8, 1),
        latent_shape=(32, 32, 4),
        metadata={"encoder": "noise", "scale": 1.0, "shift": 0.0, "image_size": 256},
    )
    for shard in writer.missing_shards():
        writer.write_shard(
            shard,
            ({"moments": noise[i % 256], "label": i % 1000} for i in writer.shard_range(shard)),
        )
    return writer.finish()


def rate(cache: LatentCache, *, in_memory: bool) -> tuple[float, list[float]]:
    """Latents a second: median over repeats of an epoch, after a warm-up of a few batches."""
    steps = max(len(cache) // BATCH, 1)
    rates = []
    batches = latent_batches(cache, global_batch=BATCH, seed=0, in_memory=in_memory)
    # Longer than the read-ahead, so that its store is not counted as speed.
    for _ in itertools.islice(batches, 8):
        pass
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for batch in itertools.islice(batches, steps):
            assert len(batch["moments"]) == BATCH
        rates.append(steps * BATCH / (time.perf_counter() - begin))
    return statistics.median(rates), rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=20480)
    parser.add_argument("--no-record", action="store_true", help="print only")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        cache = make_cache(folder, flags.records)
        print(f"written: {flags.records / (time.perf_counter() - begin):,.0f} records/s")
        for in_memory, name, bound in (
            (False, "loader random access latents/s", 15_000),
            (True, "loader in-memory latents/s", 60_000),
        ):
            value, rates = rate(cache, in_memory=in_memory)
            spread = ", ".join(f"{r:,.0f}" for r in rates)
            print(f"{name}: {value:,.0f}  ({spread}); bound {bound:,}")
            if not flags.no_record:
                note = (
                    f"{flags.records} records of 16 KiB in 8 shards, batches of {BATCH}, "
                    f"median of {REPEATS} epochs, lowest {min(rates):,.0f}, page cache warm"
                )
                # A training at scale reads at random: that figure stands there, too.
                for topic in ("pipeline",) if in_memory else ("pipeline", "scale"):
                    record(topic, name, value, ">=", bound, COMMAND, note)


if __name__ == "__main__":
    main()
