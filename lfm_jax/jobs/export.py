"""Write a release: parameters that plain orbax and safetensors open anywhere, without this package.

import orbax.checkpoint as ocp
release = ocp.StandardCheckpointer().restore("/path/to/release/0/params")

Beside them lie the config, a model card, the autoencoder where it was trained here (in diffusers'
format), and what `config.export.families` asks for: files that other projects' code loads.
"""

import json
import os
import sys
from typing import Any

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save
from tqdm import tqdm

from lfm_jax import checkpoints
from lfm_jax.checksums import named
from lfm_jax.config import overrides, to_json
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, origin
from lfm_jax.models import DiT, count_params
from lfm_jax.vae import Codec, save_vae
from lfm_jax.weights import FAMILIES, save_torch
from lfm_jax.weights.convert import exported
from lfm_jax.weights.dit import diffusers_config
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_bytes, write_json

_OWN_LICENCE = "apache-2.0"


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    return {"checkpoint": workdir.checkpoint(), **build.section(config, "export", "model")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.export
    workdir.checkpoint()  # refused now where it is refused in the end
    _check(config, workdir)
    params = checkpoints.load_params(workdir.checkpoints, ema=section.ema)
    model, codec = build.network(config), build.codec(config, workdir)
    for family in section.families:
        exported(family, params, model=model)  # refuses what its code cannot run
    described = {
        "config": to_json(config),
        "time": "t=0 is data, t=1 is noise; velocity dx/dt = (1-s) noise - data",
        "latents": {
            "scale": codec.scale,
            "shift": codec.shift,
            "shape": list(build.latent_shape(config, codec)),
            "encoder_sha256": codec.fingerprint,
        },
        "checkpoint_step": checkpoints.latest_step(workdir.checkpoints),
        "ema": section.ema,
        "params_sha256": checkpoints.fingerprint(params),
        "licence": _licence(config, workdir),
        "converted": origin.converted(workdir),
        "null_label": origin.knows_null_label(workdir.root),
    }
    release = workdir.root / "release"
    _remove_formats(release)
    checkpoints.save_release(release, params, described)
    write_json(release / "config.json", described)
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in named(params).items()}
    write_bytes(release / "params.safetensors", save(flat))
    if config.autoencoder.kind == "train":
        _write_autoencoder(release / "vae", codec)
    for family in section.families:
        _write_family(release, family, model, params, described["latents"]["shape"])
    write_bytes(release / "README.md", _card(config, workdir, described, params).encode())
    files = {str(p.relative_to(release)): p.stat().length for p in _files(release)}
    return {
        "files": sorted(files),
        "params_sha256": described["params_sha256"],
        **_push(section.push, release, files, dry_run=section.dry_run),
    }


def _check(config: ConfigDict, workdir: Workdir) -> None:
    section = config.export
    if section.push is not None and section.push.count("/") != 1:
        raise UserError(f"--config.export.push={section.push}: expected owner/name")
    for family in section.families:
        if family not in FAMILIES:
            raise UserError(
                f"--config.export.families: {family!r} is none of {', '.join(FAMILIES)}"
            )
    remote = "://" in os.fspath(workdir.root)
    if remote and (section.push or section.families or config.autoencoder.kind == "train"):
        raise UserError(
            f"--workdir={workdir.root}: expected a local one to write or upload other formats from"
        )


def _licence(config: ConfigDict, workdir: Workdir) -> str:
    """Of the weights: one's own, unless they began as another project's."""
    if config.export.licence is not None:
        return config.export.licence
    return "other" if origin.converted(workdir) else _OWN_LICENCE


def _write_autoencoder(folder: Any, codec: Codec) -> None:
    assert codec.model is not None  # it was trained here
    model = codec.model.clone(scaling_factor=codec.scale, shift_factor=codec.shift)
    save_vae(os.fspath(folder), model, codec.params)


def _remove_formats(release: Any) -> None:
    """What another export left in formats that this one may not write: it would be uploaded."""
    for name in ("vae", *FAMILIES, *(f"{family}.safetensors" for family in FAMILIES)):
        path = release / name
        if path.is_dir():
            path.rmtree()
        elif path.exists():
            path.unlink()


def _write_family(
    release: Any, family: str, model: nn.Module, params: Any, shape: list[int]
) -> None:
    file = release / f"{family}.safetensors"
    if family == "diffusers-dit":  # opened by folder
        assert isinstance(model, DiT)  # as `exported` has seen
        file = release / family / "diffusion_pytorch_model.safetensors"
        file.parent.mkdir(exist_ok=True)
        write_json(file.parent / "config.json", diffusers_config(model, shape[0], shape[2]))
    save_torch(family, params, file, model=model, latent_size=shape[0])


def _files(release: Any) -> list[Any]:
    found = []
    for path in release.iterdir():
        if not path.name.endswith(".tmp"):
            found += _files(path) if path.is_dir() else [path]
    return found


def _card(config: ConfigDict, workdir: Workdir, described: dict[str, Any], params: Any) -> str:
    """The model card: what it is, its figures, where it comes from, how to load it."""
    data, latents = config.data, described["latents"]
    evaluated = workdir.result("evaluate")
    figures = json.dumps(evaluated, indent=1) if evaluated else "not evaluated"
    classes = f"{data.num_classes} classes" if data.num_classes else "unconditional"
    network = json.dumps({k: v for k, v in overrides(config.model).items()}, indent=1)
    return f"""---
license: {described["licence"]}
library_name: lfm_jax
tags: [flow-matching, latent-flow-matching, jax]
---
# {config.model.name} latent flow, {data.source} at {data.image_size} pixels

{count_params(params):,} parameters, {classes}, step {described["checkpoint_step"]}, \
{"averaged" if described["ema"] else "raw"} weights.
Time runs from 0 (data) to 1 (noise). Latents are {"x".join(map(str, latents["shape"]))}, \
`(z - {latents["shift"]:g}) * {latents["scale"]:g}`, of the encoder with sha256
`{latents["encoder_sha256"]}`. `config.json` holds the whole experiment.
{_origin(workdir)}
## Loading

```python
import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore("/absolute/path/to/release/0/params")
```

`params.safetensors` holds the same arrays under "/"-joined names. The network is

```json
{network}
```

Sampled and trained on with lfm_jax: `--config.init=/path/to/release`.

## Figures

```json
{figures}
```

## Licence

{_licence_words(described["licence"])}
"""


def _origin(workdir: Workdir) -> str:
    converted = origin.converted(workdir)
    if not converted:
        return ""
    return (
        f"\nThe weights began as a file of the family `{converted['family']}`, sha256\n"
        f"`{converted['sha256']}`.\n"
    )


def _licence_words(licence: str) -> str:
    if licence == "other":
        return "These weights began as another project's: its licence holds for them."
    return f"The weights are released under {licence}."


def _push(
    repository: str | None, release: Any, files: dict[str, int], *, dry_run: bool
) -> dict[str, Any]:
    """Upload the release, or tell what would be uploaded."""
    if repository is None:
        return {"pushed": None}
    if dry_run:
        for name, size in sorted(files.items()):
            tqdm.write(f"would upload {name} ({size} bytes) to {repository}", file=sys.stderr)
        return {"pushed": None, "would_push": {"repository": repository, "files": files}}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=os.fspath(release), allow_patterns=sorted(files)
        )
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"--config.export.push={repository}: {str(error).split(chr(10))[0]}"
        ) from error
    return {"pushed": repository}
