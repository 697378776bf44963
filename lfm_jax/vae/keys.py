"""Names of an autoencoder's tensors in every published dialect, brought to one.

The one is diffusers' present naming, ``encoder.down_blocks.0.resnets.1.conv1.weight`` with
``to_q, to_k, to_v, to_out.0`` for attention. The others:

- diffusers before 2023: attention is ``query, key, value, proj_attn``;
- CompVis / LDM (also FLUX's ``ae.safetensors`` and MAR's KL-16): ``down.0.block.1``,
  ``mid.attn_1``, up-blocks counted from the finest, attention as 1x1 convolutions, the whole often
  under ``first_stage_model.``;
- TAESD's own two files: ``0.weight``, ``1.conv.0.weight``, the encoder's and the decoder's apart;
- Flax: a nested dict with ``down_blocks_0/resnets_1/conv1/kernel``, HWIO and ``[in, out]`` kernels.

In the other direction, `to_tree` and `from_tree` go between that naming (PyTorch layouts) and the
nested dict of this package.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lfm_jax.errors import UserError

# Where whole checkpoints keep the autoencoder, most specific first.
PREFIXES = ("first_stage_model.", "module.", "vae.")
# Parts of autoencoder checkpoints that are no part of the autoencoder.
NOT_WEIGHTS = ("loss.", "model_ema.")

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of any PyTorch dialect under diffusers' present names."""
    tensors = _strip_prefix(tensors)
    if any(re.match(r"(encoder\.down|decoder\.up)\.\d", name) for name in tensors):
        return _from_ldm(tensors)
    return {_new_attention(name): value for name, value in tensors.items()}


def is_half(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are one of the two files of TAESD's own repository: layers by number alone."""
    return bool(tensors) and all(re.match(r"\d+\.", name) for name in tensors)


def from_halves(
    encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """TAESD's two files under diffusers' names, which count the decoder's layers from one less."""
    out = {f"encoder.layers.{name}": value for name, value in encoder.items()}
    for name, value in decoder.items():
        number, _, rest = name.partition(".")
        out[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    return out


def _strip_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in PREFIXES:
        inside = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        if inside:
            return _strip_prefix(inside)
    return {k: v for k, v in tensors.items() if not k.startswith(NOT_WEIGHTS)}


def _new_attention(name: str) -> str:
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.",
        name,
    )


def _from_ldm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    up = [int(m[1]) for k in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", k))]
    last = max(up, default=0)
    out = {}
    for name, value in tensors.items():
        new = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
        new = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{last - int(m[1])}.", new)
        new = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", new)
        new = re.sub(r"\.mid\.attn_1\.", ".mid_block.attentions.0.", new)
        new = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", new)
        new = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", new)
        new = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", new)
        new = new.replace(".nin_shortcut.", ".conv_shortcut.").replace(
            ".norm_out.", ".conv_norm_out."
        )
        new = re.sub(
            r"(attentions\.\d+)\.(norm|q|k|v|proj_out)\.",
            lambda m: f"{m[1]}.{_LDM_ATTENTION[m[2]]}.",
            new,
        )
        if ".attentions." in new and value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        out[new] = value
    return out


def from_flax(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A Flax nested dict (diffusers' former Flax classes, or ours) under diffusers' names."""
    tree = tree.get("params", tree)
    return {_new_attention(name): value for name, value in from_tree(tree).items()}


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """A nested dict as one of paths."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flatten(value, (*prefix, name))
        else:
            out[(*prefix, name)] = value
    return out


def torch_name(path: tuple[str, ...]) -> str:
    """diffusers' name of a parameter here: ``("encoder", "layers_0", "kernel")`` becomes
    ``encoder.layers.0.weight``."""
    *modules, leaf = path
    leaf = "bias" if leaf == "bias" else "weight"
    # No module is named mid_block_1 or the like: a trailing _N is always a list index.
    dotted = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*dotted, leaf])


def to_torch_layout(value: np.ndarray) -> np.ndarray:
    """HWIO to OIHW, ``[in, out]`` to ``[out, in]``."""
    if value.ndim == 4:
        return np.transpose(value, (3, 2, 0, 1))
    return value.T if value.ndim == 2 else value


def to_our_layout(value: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, ``[out, in]`` to ``[in, out]``."""
    if value.ndim == 4:
        return np.transpose(value, (2, 3, 1, 0))
    return value.T if value.ndim == 2 else value


def from_tree(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The nested dict of this package under diffusers' names, in PyTorch's layouts."""
    return {
        torch_name(path): to_torch_layout(np.asarray(value))
        for path, value in flatten(tree).items()
    }


def to_tree(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    """The nested dict of this package, float32, from tensors under diffusers' names.

    Args:
        tensors: the tensors, in PyTorch's layouts.
        expected: a nested dict of the model's parameters (shapes are enough).
        source: the file, for messages.

    Raises:
        UserError: a tensor is missing, of another shape, not part of the model, or holds what is
            no float32 number; it is named.
    """
    paths = flatten(expected)
    names = {torch_name(path): path for path in paths}
    missing = [name for name in names if name not in tensors]
    extra = [name for name in tensors if name not in names]
    if missing:
        raise UserError(
            f"{source}: tensor {missing[0]} is missing ({len(missing)} missing, {len(extra)} "
            f"unexpected{f', e.g. {extra[0]}' if extra else ''})"
        )
    if extra:
        raise UserError(
            f"{source}: tensor {extra[0]} is no part of this autoencoder ({len(extra)} unexpected)"
        )
    tree: dict[str, Any] = {}
    for name, path in names.items():
        value = to_our_layout(tensors[name])
        shape = tuple(paths[path].shape)
        if value.shape != shape:
            found, wanted = tensors[name].shape, to_torch_layout(np.empty(shape)).shape
            turned = sorted(found) == sorted(wanted)
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(found)}, expected {tuple(wanted)}"
                f"{' (transposed?)' if turned else ''}"
            )
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        with np.errstate(over="ignore"):
            node[path[-1]] = np.ascontiguousarray(value, np.float32)
        # One NaN makes every image NaN, which would be seen hours later and not here.
        bad = np.size(value) - int(np.isfinite(node[path[-1]]).sum())
        if bad:
            raise UserError(
                f"{source}: tensor {name} holds {bad} values that are NaN, infinite or beyond "
                "float32; expected finite ones"
            )
    return tree
