"""P-IDS and U-IDS: can a linear classifier tell inpainted images from real ones?

Zhao et al. (2021, section 5): a linear SVM is fitted to Inception features of real and inpainted
images. U-IDS is the share it gets wrong; P-IDS the share of pairs (an image and its own inpainting)
of which the inpainting scores as the more real. Higher is better, 0.5 is indistinguishable.
"""

import numpy as np
import sklearn.svm
from jaxtyping import Float

from lfm_jax.errors import UserError


def inpainting_discrimination(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]
) -> tuple[float, float]:
    """``(P-IDS, U-IDS)``; row i of `fake` is the inpainting of row i of `real`.

    Raises `UserError` if the sets are not paired.
    """
    if real.shape != fake.shape:
        raise UserError(
            f"P-IDS: {len(real)} real and {len(fake)} inpainted images; "
            "accepted: pairs in one order"
        )
    svm = sklearn.svm.LinearSVC().set_params(dual=False)
    inputs = np.concatenate([real, fake]).astype(np.float64)
    targets = np.repeat([1, 0], len(real))
    svm.fit(inputs, targets)
    scores = svm.decision_function(inputs)
    paired = (scores[len(real) :] > scores[: len(real)]).mean()
    return float(paired), float(1 - svm.score(inputs, targets))
