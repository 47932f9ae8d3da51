"""Sets whose identities are the folders of their images' names: which names are images, and what their labels are."""

from __future__ import annotations

import os

import numpy as np

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LAYOUT = "IDENTITY/IMAGE.jpg (one folder per identity)"


def is_image(name: str) -> bool:
    """Whether a path has an image's extension; hidden files, and files in hidden folders, are left out."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not any(part.startswith(".") for part in name.split("/"))


def labels_of(path: str, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels int64 [N] and identity names of sorted paths IDENTITY/IMAGE."""
    if not names:
        raise ValueError(f"{path} holds no images ({', '.join(IMAGE_EXTENSIONS)}); expected {LAYOUT}.")
    folders = [os.path.dirname(name) for name in names]
    if "" in folders:
        raise ValueError(f"{path} holds {names[folders.index('')]} outside any identity folder; expected {LAYOUT}.")
    identities = sorted(set(folders))
    label_of = {identity: label for label, identity in enumerate(identities)}
    return np.fromiter((label_of[folder] for folder in folders), np.int64, len(folders)), identities
