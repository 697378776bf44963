"""Other people's networks with random weights, to hold ours against."""

import importlib
import sys
import types
from unittest import mock

import numpy as np
import pytest


def torch_fidelity(name: str) -> types.ModuleType:
    """`torch_fidelity.<name>`, imported where torchvision is not installed: it is needed there for
    downloads and data sets alone. The stand-in is gone afterwards, or Transformers would take it
    for the real one.
    """
    parts = ("", ".datasets", ".models", ".transforms", ".transforms.functional")
    stubs = {f"torchvision{part}": types.ModuleType(f"torchvision{part}") for part in parts}
    for stub in stubs.values():
        stub.__getattr__ = lambda attribute: mock.MagicMock(name=attribute)
    with pytest.MonkeyPatch.context() as patch:
        for key, stub in stubs.items():
            patch.setitem(sys.modules, key, stub)
        return importlib.import_module(f"torch_fidelity.{name}")


def torch_inception(seed: int = 0, features=("2048", "logits_unbiased")):
    """torch-fidelity's Inception with random weights of realistic scale, on `features`."""
    import torch

    module = torch_fidelity("feature_extractor_inceptionv3")

    cls = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *a, **k: {}),
        mock.patch.object(cls, "load_state_dict", lambda *a, **k: None),
    ):
        network = cls("inception-v3-compat", list(features))
    randomize(network, seed)
    return network, {k: v.numpy() for k, v in torch.nn.Module.state_dict(network).items()}


def randomize(network, seed: int) -> None:
    """He-normal weights and non-trivial batch norms, so that no layer is lost in the comparison."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(uniform(module.weight, 0.6, 1.4))
                module.bias.copy_(uniform(module.bias, -0.2, 0.2))
                module.running_mean.copy_(uniform(module.bias, -0.2, 0.2))
                module.running_var.copy_(uniform(module.bias, 0.6, 1.4))
            elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                fan_in = module.weight[0].numel()
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise * (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(uniform(module.bias, -0.2, 0.2))


def photographs(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """scikit-image photographs cut to each of `sizes`, uint8 ``[1, h, w, 3]``."""
    import skimage.data

    pictures = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    cut = []
    for i, (height, width) in enumerate(sizes):
        picture = pictures[i % 3]
        assert picture.shape[0] >= height and picture.shape[1] >= width
        cut.append(picture[None, :height, :width])
    return cut
