"""CLIP's words against Transformers', with random weights and a vocabulary of our own."""

import json

import numpy as np
import pytest

from lfm_jax.boundary.text import text_similarity
from lfm_jax.errors import UserError
from lfm_jax.features.clip_text import END, START, Tokenizer, open_text

TEXTS = ("a photo of a sneaker", "An  ankle-boot, isn't it? 42 shoes & café")
MERGES = ("p h", "o t", "ph ot", "phot o</w>", "s n", "e r</w>", "sn e", "a n</w>", "o f</w>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CLIP's files in small: all bytes, a few merges, random towers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import save_file

    from lfm_jax.features.clip_text import _letters

    folder = tmp_path_factory.mktemp("clip")
    letters = list(_letters().values())
    words = [*letters, *(f"{x}</w>" for x in letters), *(m.replace(" ", "") for m in MERGES)]
    words += [START, END]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    torch.manual_seed(0)
    end = len(words) - 1
    text = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=2, vocab_size=len(words))
    text |= dict(num_attention_heads=2, max_position_embeddings=40, eos_token_id=end)
    vision = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    vision |= dict(num_attention_heads=1, image_size=32, patch_size=16)
    config = transformers.CLIPConfig(
        text_config=text | {"bos_token_id": end - 1}, vision_config=vision, projection_dim=24
    )
    network = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tensors = {k: v.numpy() for k, v in network.state_dict().items() if "position_ids" not in k}
    save_file(tensors, folder / "model.safetensors")
    return folder, network


def test_tokens_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    path, _ = folder
    theirs = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    ours = Tokenizer(path)
    for text in (*TEXTS, "photo", "über_straße 2x", ""):
        wanted = theirs(text)["input_ids"]
        found = ours(text, length=60)
        assert found[: len(wanted)].tolist() == wanted
        assert set(found[len(wanted) :].tolist()) == {ours.end}
    assert len(ours("photo")) == 77 and ours("photo")[1] == ours.vocabulary["photo</w>"]


def test_texts_lie_where_transformers_puts_them(folder):
    import torch

    path, network = folder
    tokenizer = Tokenizer(path)
    ids = np.stack([tokenizer(text, length=40) for text in TEXTS]).astype(np.int64)
    with torch.no_grad():
        states = network.text_model(input_ids=torch.from_numpy(ids)).pooler_output
        wanted = network.text_projection(states).numpy()
    found, _ = open_text(path, TEXTS)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_similarities_are_cosines_of_images_and_texts(folder):
    path, _ = folder
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    similarity = text_similarity(path, TEXTS)
    found = similarity(images)
    assert found.shape == (3, 2) and np.all(np.abs(found) <= 100)
    np.testing.assert_allclose(similarity(images[1:2]), found[1:2], atol=1e-3)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors or pytorch_model\.bin"):
        open_text(tmp_path, TEXTS)
    with pytest.raises(UserError, match=r"vocab\.json"):
        Tokenizer(tmp_path)
