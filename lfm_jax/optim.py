"""AdamW as the papers use it: warm-up, constant or cosine rate, optional global-norm clip."""

import optax


def learning_rate(
    peak: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    schedule: str = "constant",
    final: float = 0.0,
) -> optax.Schedule:
    """Learning rate as a function of the update count.

    Args:
        peak: the rate after warm-up.
        steps: updates in all; the cosine reaches `final` there.
        warmup_steps: updates of linear rise from 0.
        schedule: "constant" or "cosine".
        final: absolute floor of the cosine (LFM uses 1e-5).
    """
    if schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(
            peak, max(steps - warmup_steps, 1), alpha=min(final / peak, 1.0)
        )
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def adamw(
    rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW after an optional clip of the global gradient norm (0: off)."""
    chain = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    return optax.chain(*chain, optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay))
