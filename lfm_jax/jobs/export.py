"""Write a release: parameters that plain orbax and safetensors open anywhere, without this package.

import orbax.checkpoint as ocp
release = ocp.StandardCheckpointer().restore("/path/to/release/0/params")
"""

import json
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save

from lfm_jax import checkpoints
from lfm_jax.config import to_json
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_bytes, write_json


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    return {"checkpoint": workdir.checkpoint(), **build.section(config, "export", "model")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.export
    if section.push is not None and section.push.count("/") != 1:
        raise UserError(f"--config.export.push={section.push}: expected owner/name")
    params = checkpoints.load_params(workdir.checkpoints, ema=section.ema)
    codec = build.codec(config, workdir)
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
    }
    release = workdir.root / "release"
    checkpoints.save_release(release, params, described)
    write_json(release / "config.json", described)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    write_bytes(release / "params.safetensors", save(flat))
    write_bytes(release / "README.md", _card(config, workdir, described).encode())
    files = sorted(str(p.relative_to(release)) for p in release.glob("*") if p.is_file())
    if section.push is not None:
        _push(section.push, release, dry_run=section.dry_run)
    return {
        "files": files,
        "params_sha256": described["params_sha256"],
        "pushed": None if section.dry_run else section.push,
    }


def _card(config: ConfigDict, workdir: Workdir, described: dict[str, Any]) -> str:
    """The model card: what it is, its figures, how to load it."""
    evaluated = workdir.result("evaluate")
    figures = json.dumps(evaluated, indent=1) if evaluated else "not evaluated"
    return f"""---
license: apache-2.0
library_name: lfm_jax
tags: [flow-matching, latent-flow-matching, jax]
---
# {config.model.name} latent flow, {config.data.source} at {config.data.image_size} pixels

Step {described["checkpoint_step"]}, {"averaged" if described["ema"] else "raw"} parameters.
Time runs from 0 (data) to 1 (noise); `config.json` holds the experiment and the latents' scale.

## Loading

```python
import orbax.checkpoint as ocp
params = ocp.StandardCheckpointer().restore("/absolute/path/to/release/0/params")
```

`params.safetensors` holds the same arrays under "/"-joined names.

## Figures

```json
{figures}
```
"""


def _push(repository: str, release: Any, *, dry_run: bool) -> None:
    if dry_run:
        return
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(release))
