"""Write tests/golden/vae.npz from diffusers' PyTorch class: run where torch is installed.

    python tests/golden/make_vae.py

The file holds the weights of a tiny autoencoder under diffusers' names, an input, and what
diffusers makes of it, so that parity is checked on machines without torch, too.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch

CONFIG = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def main():
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**CONFIG).eval()
    with torch.inference_mode():
        for value in model.parameters():
            if value.ndim == 1:
                value += 0.2 * torch.randn(value.shape)
        x = 0.5 * torch.randn(2, 3, 12, 20)
        z = torch.randn(2, 4, 6, 10)
        posterior = model.encode(x).latent_dist
        image = model.decode(z).sample
    arrays = {f"weight/{k}": v.numpy() for k, v in model.state_dict().items()}
    data = {"x": x, "mean": posterior.mean, "logvar": posterior.logvar, "z": z, "image": image}
    arrays |= {k: v.permute(0, 2, 3, 1).numpy() for k, v in data.items()}
    np.savez_compressed(Path(__file__).with_name("vae.npz"), **arrays)


if __name__ == "__main__":
    main()
