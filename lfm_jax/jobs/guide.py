"""From config to guidance: what stands beside the network, and how the velocity is wrapped.

The order is fixed: classifier-free guidance of the network, autoguidance of the result away from a
weak network under the same condition, then the classifier's gradient on top.
"""

import dataclasses
import json
from typing import Any

import flax.struct
from etils import epath
from ml_collections import ConfigDict

from lfm_jax import checkpoints
from lfm_jax import config as config_lib
from lfm_jax.errors import UserError
from lfm_jax.flow import (
    LogProbability,
    NetworkVelocity,
    autoguidance,
    classifier_guidance,
)
from lfm_jax.jobs import build, classify, origin
from lfm_jax.workdir import Workdir


@flax.struct.dataclass
class OtherNetworks:
    """Networks beside the sampled one, with their parameters; None where there is none."""

    weak: NetworkVelocity | None = None
    classifier: LogProbability | None = None


def options(config: ConfigDict) -> dict[str, Any]:
    """What `config.sample` says of guidance by other networks."""
    section = config.sample
    return {
        "weak_scale": section.autoguidance,
        "classifier_scale": section.classifier_guidance,
        "max_weight": section.classifier_max_weight,
    }


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Which other networks samples depend on, by content; empty where there are none."""
    section, found = config.sample, {}
    if section.autoguidance != 1:
        found["weak"] = Workdir(epath.Path(section.weak)).checkpoint()
    if section.classifier_guidance:
        found["classifier"] = workdir.require_result("classifier")["checkpoint"]
    return found


def check_null_label(config: ConfigDict, workdir: Workdir) -> None:
    """Refuse `config.sample.guidance` for weights that no null label was trained with.

    Raises:
        UserError: such weights and a scale other than 1, where the network is not told the scale.
    """
    scale = config.sample.guidance
    # Of several baked scales the network is told one; a single one is its own, and any scale of the
    # sampler comes on top.
    told = config.loss == "mmd" and len(config.mmd.baked) > 1
    if scale != 1 and not told:
        origin.require_null_label(workdir.root, f"--config.sample.guidance={scale:g}", "1 (off)")


def other_networks(config: ConfigDict, workdir: Workdir) -> OtherNetworks:
    """The networks that the guidance of `config.sample` needs, from their workdirs.

    Raises:
        UserError: one that is missing or of other latents.
    """
    section = config.sample
    weak = classifier = None
    if section.autoguidance != 1:
        weak = _weak(config, workdir)
    if section.classifier_guidance:
        place = classify.folder(workdir)
        if checkpoints.latest_step(place) is None:
            raise UserError(
                f"--config.sample.classifier_guidance={section.classifier_guidance:g}: "
                f"{place} holds no classifier; expected --job=classifier to have run"
            )
        classifier = LogProbability(
            params=checkpoints.load_params(place), label=None, model=classify.network(config)
        )
    return OtherNetworks(weak=weak, classifier=classifier)


def further(
    guided: Any,
    beside: OtherNetworks,
    label: Any,
    *,
    weak_scale: float,
    classifier_scale: float,
    max_weight: float,
    **how: Any,
) -> Any:
    """A velocity that is guided already, guided on by the other networks.

    Args:
        guided: the network's own, or under classifier-free guidance.
        beside: the other networks; the weak one under its own view of the same condition.
        label: the class of each row, for the classifier.
        weak_scale: autoguidance's scale.
        classifier_scale, max_weight: classifier guidance's scale and bound.
        how: channels, interval and rescale of autoguidance.
    """
    if beside.weak is not None:
        guided = autoguidance(guided, beside.weak, scale=weak_scale, **how)
    if beside.classifier is not None:
        log_prob = dataclasses.replace(beside.classifier, label=label)
        guided = classifier_guidance(
            guided, log_prob, scale=classifier_scale, max_weight=max_weight
        )
    return guided


def _weak(config: ConfigDict, workdir: Workdir) -> NetworkVelocity:
    """The network of `config.sample.weak`: of this workdir's latents, of any size."""
    section = config.sample
    there = Workdir(epath.Path(section.weak))
    if not there.config.exists():
        raise UserError(f"--config.sample.weak={section.weak}: no workdir; expected a trained one")
    told = json.loads(there.config.read_text())["config"]
    other = config_lib.default_config()
    for name, value in told["model"].items():
        if name in other.model:
            other.model[name] = tuple(value) if isinstance(value, list) else value
    other.data.num_classes = told["data"]["num_classes"]
    origin.adopt(other, there)
    if other.data.num_classes != config.data.num_classes:
        raise UserError(
            f"--config.sample.weak={section.weak}: a network of {other.data.num_classes} classes; "
            f"expected {config.data.num_classes}"
        )
    kind = (told.get("condition") or {}).get("kind", "none")
    if kind != config.condition.kind:
        raise UserError(
            f"--config.sample.weak={section.weak}: a network of condition.kind={kind}; expected "
            f"{config.condition.kind}"
        )
    made, wanted = (_latents(place) for place in (there, workdir))
    if made != wanted:
        raise UserError(
            f"--config.sample.weak={section.weak}: its latents are another autoencoder's; expected "
            "a network of the same latents"
        )
    model = build.network(other)
    params = checkpoints.load_params(there.checkpoints, step=section.weak_step or None)
    return NetworkVelocity(params=params, model=model, t_max=model.t_max)


def _latents(workdir: Workdir) -> str | None:
    """Which encoder made a workdir's latents, where it says."""
    found = workdir.latents("train") / "metadata.json"
    return json.loads(found.read_text()).get("encoder") if found.exists() else None
