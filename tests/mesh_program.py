"""Run by test_sharding: a few steps of every objective on several meshes of virtual devices."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax import mmd, sharding
from lfm_jax.flow import flow_matching_loss
from lfm_jax.models import create_model, init_params
from lfm_jax.optim import adamw
from lfm_jax.state import create_state, make_step
from lfm_jax.vae import AutoencoderKL, autoencoder_loss

BATCH, STEPS, SHAPE = 8, 20, (4, 4, 4)
KEY = jax.random.key(0)
MODEL = create_model("DiT", hidden=64, depth=2, heads=4, patch=1, num_classes=3)
AUTOENCODER = AutoencoderKL(
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_groups=8,
)


def flow():
    loss = flow_matching_loss(MODEL, scale=1.0, num_classes=3)
    return lambda: init_params(MODEL, KEY, SHAPE), loss


def autoencoder():
    loss = autoencoder_loss(AUTOENCODER, kl_weight=1e-3, reconstruction="l2", mirror=False)
    image = jnp.zeros((1, 8, 8, 1))
    return lambda: AUTOENCODER.init(KEY, image)["params"], loss


def finetuning():
    """Two differentiated steps of the sampler against features of a bank."""
    maps = [mmd.random_maps(KEY, SHAPE[-1])]
    rows = mmd.row_generator(MODEL, maps=maps, latent_shape=SHAPE, num_classes=3, steps=(2,))
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 64).astype(np.int32)
    latents = jnp.asarray(random.normal(size=(64, *SHAPE)), jnp.float32)
    features = mmd.all_features(maps, latents, jnp.asarray(labels), jax.random.split(KEY, 64))
    spaces = {
        name: mmd.make_space(real, joint=4.0, num_classes=3) for name, real in features.items()
    }
    bank = mmd.make_bank(jax.tree.map(np.asarray, features), labels, num_classes=3)
    loss = mmd.mmd_loss(rows, spaces, bank=bank, bank_rows=32)
    return lambda: init_params(MODEL, KEY, SHAPE), loss


def batch(step):
    random = np.random.default_rng(step)
    position = np.arange(BATCH, dtype=np.uint32) + step * BATCH
    moments = random.normal(size=(BATCH, 4, 4, 8)).astype(np.float16)
    return {
        "moments": moments,
        "image": random.integers(0, 256, (BATCH, 8, 8, 1)).astype(np.uint8),
        "label": random.integers(0, 3, BATCH).astype(np.int32),
        "index": position.astype(np.int32),
        "position": position,
    }


def flat(tree):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def moments(state):
    """Adam's first moments: after one update a tenth of the (clipped) gradient."""
    return next(
        part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=_has_mu) if _has_mu(part)
    )


def _has_mu(part):
    return hasattr(part, "mu")


def main(out, *wanted):
    """`wanted`: objective and mesh, as in "flow:2,4,1"."""
    arrays, facts = {}, {}
    builders = {"flow": flow, "autoencoder": autoencoder, "mmd": finetuning}
    for name, text in (case.split(":") for case in wanted):
        init, loss = builders[name]()
        sizes = tuple(int(part) for part in text.split(","))
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        placement = sharding.batch_sharding(mesh)
        tx = adamw(lambda step: 1e-3, grad_clip=1.0)
        state = create_state(init, tx, mesh, ema=True)
        placed = jax.tree.map(lambda x: x.sharding, state)
        # A fresh network answers 0: without this nothing but its last layer has a gradient.
        moved = jax.tree.map(
            lambda x: (
                np.asarray(x) + 0.02 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
            ),
            state.params,
        )
        state = state.replace(params=jax.device_put(moved, placed.params))
        step = make_step(loss, tx, KEY, ema_decay=0.9, like=state)
        losses = []
        for i in range(STEPS):
            state, metrics = step(state, jax.device_put(batch(i), placement))
            losses.append(float(metrics["loss"]))
            if i == 0:
                arrays[f"{name}:{text} gradient"] = flat(moments(state))
        arrays[f"{name}:{text} losses"] = np.array(losses)
        arrays[f"{name}:{text} params"] = flat(state.params)
        kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, placed)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        facts[f"{name}:{text}"] = {"kept": all(jax.tree.leaves(kept)), "bytes": held}
    np.savez(pathlib.Path(out) / "arrays.npz", **arrays)
    (pathlib.Path(out) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
