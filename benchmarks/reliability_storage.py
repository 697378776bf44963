"""Damage to everything that a run keeps: is it found, named, and is nothing good lost?

Every file of the newest checkpoint is cut, flipped in one random bit or removed in turn; so is
every shard and description of the cache, the result and config files, the samples' parts. A fault
survives if the state that comes back is bit for bit one that was saved, or if the run stops in one
line that names the file. A state that is neither is silent garbage, and counts as lost.
"""

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def cut(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(bytes(data))


def remove(path: Path, dice: random.Random) -> None:
    path.unlink()


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": cut,
    "bit flipped": flip,
    "removed": remove,
}


def checkpoints(folder: Path, dice: random.Random, rounds: int) -> Iterator[tuple[str, str]]:
    """(kind of fault, problem or "") for each fault in a checkpoint."""
    import jax
    import jax.numpy as jnp
    import optax

    from lfm_jax import checkpoints as store
    from lfm_jax import sharding
    from lfm_jax.errors import UserError
    from lfm_jax.state import create_state

    def state_of(seed: int) -> Any:
        def init() -> dict[str, Any]:
            return {"layer": {"w": jax.random.normal(jax.random.key(seed), (60, 60))}}

        return create_state(init, optax.adam(1e-3), sharding.make_mesh(), ema=True)

    saved = {}
    with store.open_manager(folder / "run", keep=9) as manager:
        for step in (1, 2):
            saved[step] = state_of(step).replace(step=jnp.int32(step))
            store.save(manager, step, saved[step], data={"examples_drawn": step}, config={})
    target = state_of(0)

    def problem(copy: Path) -> str:
        try:
            with store.open_manager(copy, keep=9) as manager:
                step, state, data = store.newest_whole(manager, target)
        except UserError as error:
            return "" if "\n" not in str(error) and str(copy) in str(error) else f"{error}"
        except Exception as error:
            return f"raised {error!r}"
        equal = jax.tree.map(np.array_equal, jax.device_get(state), jax.device_get(saved[step]))
        if not all(jax.tree.leaves(equal)) or data["examples_drawn"] != step:
            return f"silent garbage in place of step {step}"
        if step == 1 and not ((copy / "2").exists() or (copy / "damaged-2").exists()):
            return "the damaged step was deleted"
        return ""

    names = [p.relative_to(folder / "run") for p in _files(folder / "run/2")]
    for number in range(rounds):
        for kind, damage in DAMAGE.items():
            name = names[number % len(names)]
            copy = folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            subprocess.run(["cp", "-r", folder / "run", copy], check=True)
            damage(copy / name, dice)
            yield f"checkpoint file {kind}", problem(copy)


def caches(folder: Path, dice: random.Random, rounds: int) -> Iterator[tuple[str, str]]:
    """The same for shards and description of a latent cache, read with and without checksums."""
    from lfm_jax.data import CacheWriter, open_cache
    from lfm_jax.errors import UserError

    place = folder / "cache/train"
    writer = CacheWriter(
        place,
        num_examples=40,
        shard_size=10,
        latent_shape=(4, 4, 2),
        metadata={"encoder": "e" * 64, "scale": 1.0, "shift": 0.0, "image_size": 8},
    )
    noise = np.random.default_rng(0)
    for shard in writer.missing_shards():
        rows = [{"moments": noise.normal(size=(4, 4, 4))} for _ in writer.shard_range(shard)]
        writer.write_shard(shard, rows)
    wanted = writer.finish().read(range(40))
    victims = [*sorted(place.glob("*array_record*")), place / "metadata.json"]
    for number in range(rounds):
        path = victims[number % len(victims)]
        for kind, damage in DAMAGE.items():
            whole = path.read_bytes()
            damage(path, dice)
            found = ""
            for verify in (None, False):  # None: by size, which means yes for this one
                try:
                    read = open_cache(place, encoder="e" * 64, verify=verify).read(range(40))
                    if not all(np.array_equal(read[k], wanted[k]) for k in wanted):
                        found = "silent garbage"
                except UserError as error:
                    if "\n" in str(error) or str(place) not in str(error):
                        found = str(error)
                except Exception as error:
                    found = f"raised {error!r}"
            path.write_bytes(whole)
            what = "description" if path.suffix == ".json" else "shard"
            yield f"{what} of the cache {kind}", found


def full_disks(folder: Path, dice: random.Random, rounds: int) -> Iterator[tuple[str, str]]:
    """Save on a tmpfs of a random size until it is full; the newest whole step must be there."""
    import jax
    import jax.numpy as jnp

    from lfm_jax import checkpoints as store
    from lfm_jax.errors import Failed

    for _ in range(rounds):
        disk = folder / "disk"
        disk.mkdir(exist_ok=True)
        size = dice.randrange(150, 500)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return  # mounting needs CAP_SYS_ADMIN
        problem, states = "it never became full", {}
        try:
            with store.open_manager(disk, keep=30) as manager:
                for step in range(1, 40):
                    key = jax.random.key(step)
                    states[step] = {"ema": {"w": jax.random.normal(key, (50, 50))}}
                    states[step]["params"] = {"w": jnp.zeros(3)}
                    store.save(manager, step, states[step], data={}, config={})
        except Failed as error:
            newest = store.latest_step(disk)
            problem = "" if "\n" not in str(error) else str(error)
            if newest is not None:
                same = np.array_equal(store.load_params(disk)["w"], states[newest]["ema"]["w"])
                problem = problem if same else f"step {newest} is not what was saved"
        except Exception as error:
            problem = f"raised {error!r}"
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
        yield "disk full", problem


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
