"""Judges that know no network: a support vector machine on pixels, and within-class spread.

Class accuracy alone rewards blurred class means; the spread of pixels within a class, beside that
of real images, shows a generator that has lost variety.
"""

import numpy as np
from jaxtyping import Int, UInt8


def pixel_std_ratio(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    real: dict[str, np.ndarray],
    num_classes: int,
) -> dict[str, float]:
    """Per class: mean over pixels of the standard deviation, over the real images' own.

    Args:
        images: samples, uint8.
        labels: their requested classes.
        real: ``{"image", "label"}`` of real images.
        num_classes: classes 0..num_classes-1; those with fewer than two samples or
            real images are left out.

    Returns:
        "min", "mean" and "max" of the ratio over the classes; 1 is the real variety. Empty where
        every class is left out.
    """
    ratios = []
    for label in range(num_classes):
        fake = images[labels == label].astype(np.float64)
        true = real["image"][real["label"] == label].astype(np.float64)
        if min(len(fake), len(true)) < 2:
            continue
        ratios.append(fake.std(0).mean() / true.std(0).mean())
    if not ratios:
        return {}
    return {
        "min": float(np.min(ratios)),
        "mean": float(np.mean(ratios)),
        "max": float(np.max(ratios)),
    }


def svc_accuracy(
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
) -> dict[str, float]:
    """A scikit-learn SVC (RBF) on raw pixels: its accuracy on real test images and on samples."""
    from sklearn.svm import SVC

    def rows(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1) / 255.0

    machine = SVC(C=10.0, gamma="scale").fit(rows(train["image"]), train["label"])
    return {
        "svc_accuracy_real": float(machine.score(rows(test["image"]), test["label"])),
        "svc_accuracy_samples": float(machine.score(rows(images), labels)),
    }
