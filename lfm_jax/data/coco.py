"""COCO's layouts: the boxes of things and stuff as they lie in the cropped square image.

    ROOT/annotations/instances_{train,val}2017.json      80 things
    ROOT/annotations/stuff_{train,val}2017.json          91 kinds of stuff, and "other" (left out)

As latent flow matching's layouts: objects of more than 1e-5 of the image's area, and at most 30 of
them, the largest. It leaves out images of fewer than 2 or of more; here the folder of images says
which there are. Ids are places in the sorted list of category ids, things first; 172 and more of
the published vocabulary do not occur. Images are found by file name, ``000000000139.jpg``.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lfm_jax.data.source import ImageSource, hashed
from lfm_jax.errors import UserError, blaming

MIN_AREA = 1e-5
_OTHER = "other"
_SPLITS = {"train": "train2017", "test": "val2017", "validation": "val2017"}


def open_coco_layouts(
    path: str, images: ImageSource, *, split: str, max_objects: int
) -> dict[str, Any]:
    """What a `LayoutSource` is made of: "max_objects", "class_names", "fingerprint", "read".

    Args:
        path: ROOT, or its ``annotations`` folder.
        images: a source of files named as COCO's.
        max_objects: the largest ones are kept.

    Raises:
        UserError: files missing or damaged, images without layout (the first of them are named).
    """
    if not path:
        raise UserError("condition.path is unset: COCO layouts need the folder of annotations")
    if split not in _SPLITS:
        raise UserError(f"coco split {split!r}: expected one of {', '.join(_SPLITS)}")
    if not images.files:
        raise UserError(f"condition.source=coco: {images.name} has no file names to pair with")
    root = Path(path).expanduser()
    root = root / "annotations" if (root / "annotations").is_dir() else root
    things = _read(root / f"instances_{_SPLITS[split]}.json")
    stuff_file = root / f"stuff_{_SPLITS[split]}.json"
    parts = [things] + ([_read(stuff_file)] if stuff_file.exists() else [])

    with blaming(str(root), "COCO's annotations"):
        names = {c["id"]: str(c["name"]) for part in parts for c in part["categories"]}
        names = {number: name for number, name in names.items() if name != _OTHER}
        place = {number: i for i, number in enumerate(sorted(names))}
        sizes = {
            image["file_name"]: (image["id"], image["width"], image["height"])
            for image in things["images"]
        }
        for name, (_, width, height) in sizes.items():
            if not min(width, height) > 0:
                raise UserError(f"image {name}: {width}x{height} pixels; expected at least 1x1")
        objects: dict[int, list] = {}
        for part in parts:
            for one in part["annotations"]:
                if one["category_id"] in place:
                    x, y, width, height = map(float, one["bbox"])
                    row = (place[one["category_id"]], x, y, width, height)
                    objects.setdefault(one["image_id"], []).append(row)

    files = [PurePosixPath(name).name for name in images.files]
    without = [name for name in files if name not in sizes]
    if without:
        raise UserError(
            f"{root}: no entry for image {', '.join(without[:8])} ({len(without)} in all); "
            f"expected images of {_SPLITS[split]}"
        )

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        boxes = np.zeros((len(indices), max_objects, 4), np.float32)
        classes = np.full((len(indices), max_objects), -1, np.int32)
        for row, index in enumerate(indices):
            number, width, height = sizes[files[index]]
            found = _cropped(objects.get(number, []), width, height)[:max_objects]
            for i, (label, box) in enumerate(found):
                boxes[row, i], classes[row, i] = box, label
        return boxes, classes

    return {
        "max_objects": max_objects,
        "class_names": tuple(names[number] for number in sorted(names)),
        "fingerprint": hashed(images.fingerprint, f"coco {max_objects} {MIN_AREA}", str(place)),
        "read": read,
    }


def _cropped(rows: list, width: int, height: int) -> list[tuple[int, np.ndarray]]:
    """Boxes ``x, y, w, h`` in pixels as corners in the central square, the largest first."""
    side = min(width, height)
    origin = np.array([(width - side) / 2, (height - side) / 2] * 2)
    found = []
    for label, x, y, w, h in rows:
        box = np.clip((np.array([x, y, x + w, y + h]) - origin) / side, 0, 1)
        area = (box[2] - box[0]) * (box[3] - box[1])
        if area > MIN_AREA:
            found.append((area, label, box))
    found.sort(key=lambda row: -row[0])
    return [(label, box) for _, label, box in found]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        for key in ("images", "annotations", "categories"):
            content[key]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected COCO's annotations") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error!r}); expected COCO's JSON") from None
    return content
