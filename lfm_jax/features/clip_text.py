"""CLIP's text tower and its tokenizer (Radford et al., 2021): sentences to the space of the images.

A causal transformer over byte-pair tokens; the embedding is the state at the end token, after the
last norm, projected. The folder is the published one: ``model.safetensors`` or
``pytorch_model.bin``, ``vocab.json`` and ``merges.txt``.
"""

import functools
import html
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lfm_jax.errors import UserError, blaming
from lfm_jax.features import weights
from lfm_jax.features.vit import quick_gelu

START, END = "<|startoftext|>", "<|endoftext|>"
# Words, single digits, and runs of anything else; contractions stay with their apostrophe.
_PIECES = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+",
    re.IGNORECASE,
)


class Tokenizer:
    """CLIP's byte-pair encoding from its two published files.

    Args:
        folder: holds ``vocab.json`` and ``merges.txt``.

    Raises:
        UserError: a file is missing or is not what its name says.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        try:
            self.vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            self.start, self.end = self.vocabulary[START], self.vocabulary[END]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"CLIP folder {folder}: {error}; expected CLIP's vocab.json and merges.txt"
            ) from None
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        self.ranks = {pair: i for i, pair in enumerate(pairs) if len(pair) == 2}

    def __call__(self, text: str, *, length: int = 77) -> Int[np.ndarray, " n"]:
        """Token numbers between the start and the end token, padded with the end token."""
        clean = re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()
        ids = [self.start]
        for piece in _PIECES.findall(clean):
            letters = "".join(_letters()[byte] for byte in piece.encode("utf-8"))
            ids += [self.vocabulary.get(part, self.end) for part in self._merge(letters)]
        ids = [*ids[: length - 1], self.end]
        return np.array(ids + [self.end] * (length - len(ids)), np.int32)

    def _merge(self, word: str) -> list[str]:
        """Join the neighbours of the lowest rank until none is known; the last part ends a word."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            ranked = [
                (self.ranks.get(pair, len(self.ranks)), i)
                for i, pair in enumerate(itertools.pairwise(parts))
            ]
            rank, i = min(ranked)
            if rank == len(self.ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts


@functools.cache
def _letters() -> dict[int, str]:
    """A printable letter for each byte: the bytes that print, then 256, 257, ... for the rest."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in prints}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def text_features(
    tensors: Mapping[str, np.ndarray], ids: Int[np.ndarray, "n l"], *, end: int, heads: int = 0
) -> Float[Array, "n d"]:
    """Projected embeddings of token rows, not normalised.

    Args:
        tensors: a CLIP state dict under transformers' names.
        ids: rows of `Tokenizer`.
        end: number of the end token.
        heads: 0 takes CLIP's rule of 64 channels a head.

    Raises:
        UserError: no text tower in `tensors`.
    """
    tensors = {k.removeprefix("text_model."): v for k, v in tensors.items() if "vision" not in k}
    names = ("embeddings.token_embedding.weight", "text_projection.weight")
    weights.require(tensors, dict.fromkeys(names), "CLIP's text tower")
    width = tensors[names[0]].shape[1]
    heads = heads or width // 64
    count, length = ids.shape
    depth = len(weights.block_numbers(tensors, r"encoder\.layers\.(\d+)\."))

    def linear(x: Array, name: str) -> Array:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    with jax.default_matmul_precision("highest"):
        x = jnp.asarray(tensors[names[0]])[ids]
        x = x + tensors["embeddings.position_embedding.weight"][:length]
        causal = np.tril(np.ones((length, length), bool))
        for i in range(depth):
            at = f"encoder.layers.{i}"
            y = norm(x, f"{at}.layer_norm1")
            q, k, v = (
                linear(y, f"{at}.self_attn.{part}_proj").reshape(count, length, heads, -1)
                for part in "qkv"
            )
            logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) * (width // heads) ** -0.5
            share = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
            y = jnp.einsum("nhqk,nkhd->nqhd", share, v).reshape(count, length, width)
            x = x + linear(y, f"{at}.self_attn.out_proj")
            y = quick_gelu(linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1"))
            x = x + linear(y, f"{at}.mlp.fc2")
        x = norm(x, "final_layer_norm")
        last = np.argmax(ids == end, axis=1)
        return x[np.arange(count), last] @ tensors["text_projection.weight"].T


def open_text(folder: str | os.PathLike, texts: Sequence[str]) -> tuple[Float[Array, "n d"], Path]:
    """Embeddings of `texts`, and the weights file (for the image tower), of a CLIP folder.

    Raises:
        UserError: no folder, no weights or vocabulary in it.
    """
    folder = Path(folder).expanduser()
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UserError(
            f"CLIP folder {folder}: expected {files[0].name} or {files[1].name} in it, with "
            "vocab.json and merges.txt"
        )
    tokenizer = Tokenizer(folder)
    tensors = weights.read_tensors(file)
    length = len(tensors.get("text_model.embeddings.position_embedding.weight", range(77)))
    ids = np.stack([tokenizer(text, length=length) for text in texts])
    with blaming(f"weights {file}", "a CLIP text tower's"):
        return text_features(tensors, ids, end=tokenizer.end), file
