"""Feature networks behind one interface, `Extractor`: used by evaluation, MMD and editing."""

from lfm_jax.features.classifier import (
    Classifier,
    classifier_accuracy,
    load_extractor,
    predict,
    read_extractor_metadata,
    save_extractor,
    train_classifier,
)
from lfm_jax.features.extractor import Extractor
from lfm_jax.features.published import PUBLISHED, open_extractor
from lfm_jax.features.resize import center_crop, resize, resize_matrix

__all__ = [
    "PUBLISHED",
    "Classifier",
    "Extractor",
    "center_crop",
    "classifier_accuracy",
    "load_extractor",
    "open_extractor",
    "predict",
    "read_extractor_metadata",
    "resize",
    "resize_matrix",
    "save_extractor",
    "train_classifier",
]
