"""Images of which a set has copies, found by a hash of their bytes."""

from __future__ import annotations

import hashlib

import numpy as np


def digest(data: bytes) -> np.ndarray:
    """uint64 [2]: 16 bytes an image, so that two of a billion different ones agree with a probability of 1e-21."""
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)


def copies(digests_n2: np.ndarray, images_n: np.ndarray) -> list[np.ndarray]:
    """Those of the images `images_n`, int64 [n] ascending, that are equal: an ascending array of two or more for each group, in the order
    of their first ones. digests_n2: uint64 [n, 2], the images' own."""
    order = np.lexsort((images_n, digests_n2[:, 1], digests_n2[:, 0]))
    same = (digests_n2[order[1:]] == digests_n2[order[:-1]]).all(axis=1)
    groups = np.split(images_n[order], np.flatnonzero(~same) + 1) if same.any() else []
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))
