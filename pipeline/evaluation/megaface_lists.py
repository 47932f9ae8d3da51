"""The lists of MegaFace in InsightFace's packing: probes, distractors, and which of them are noise."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from dali_loaders.names import printable
from dali_loaders.regular import open_regular

_PROBES, _DISTRACTORS = "facescrub_lst", "megaface_lst"
_NOISES = "facescrub_noises.txt", "megaface_noises.txt"


@dataclass(frozen=True, eq=False)
class MegaFaceLists:
    """Distractors that are noise come last."""

    probes: list[str]  # P paths below facescrub_images
    identities: list[str]
    identity_P: np.ndarray  # int64
    distractors: list[str]  # G paths below megaface_images
    noise_P: np.ndarray  # bool
    clean: int  # distractors before the first that is noise
    refined: bool  # whether there are lists of noise


def read_lists(folder: str) -> MegaFaceLists:
    """Those of `folder`. ValueError, with file and line, for what is in another form, and where one of the two lists of noise is missing.

    Layout: gen_megaface.py and remove_noises.py of InsightFace's recognition/_evaluation_/megaface."""
    probes = _paths(os.path.join(folder, _PROBES), 2, "IDENTITY/IMAGE")
    distractors = _paths(os.path.join(folder, _DISTRACTORS), 3, "FOLDER/FOLDER/IMAGE")
    there = [name for name in _NOISES if os.path.isfile(os.path.join(folder, name))]
    if len(there) == 1:
        missing = next(name for name in _NOISES if name not in there)
        raise ValueError(f"{folder} has {there[0]} and no {missing}; expected both lists of noise, or none for the score without them.")
    noises = [set(_noises(os.path.join(folder, name))) for name in there] or [set(), set()]
    identities = sorted({path.split("/")[-2] for path in probes})
    number = {identity: place for place, identity in enumerate(identities)}
    identity_P = np.array([number[path.split("/")[-2]] for path in probes], np.int64)
    noise_P = np.array([path.split("/")[-1] in noises[0] for path in probes])
    noise_G = np.array(["/".join(path.split("/")[-3:]) in noises[1] for path in distractors])
    for name, list_name, noise_n in zip(there, (_PROBES, _DISTRACTORS), (noise_P, noise_G), strict=False):
        if not noise_n.any():
            raise ValueError(
                f"{os.path.join(folder, name)} names none of the images of {list_name}, so nothing would be refined; expected names as "
                "they are there, with their extensions. Take both lists of noise away for the score without them."
            )
    if noise_G.all():
        raise ValueError(f"{os.path.join(folder, _NOISES[1])} names every image of {_DISTRACTORS}; expected distractors that are no noise.")
    only_noise = np.setdiff1d(identity_P, identity_P[~noise_P])
    if len(only_noise):
        raise ValueError(
            f"{os.path.join(folder, _NOISES[0])} names every image of {len(only_noise)} identities of {_PROBES}, such as "
            f"{identities[only_noise[0]]}; expected an image of each that is no noise."
        )
    order = np.argsort(noise_G, kind="stable")
    ordered = [distractors[place] for place in order.tolist()]
    return MegaFaceLists(probes, identities, identity_P, ordered, noise_P, int((~noise_G).sum()), bool(there))


def _paths(path: str, parts: int, expected: str) -> list[str]:
    """Each once; lines may have more folders before these."""
    found = []
    for number, line in _lines(path):
        if len(line.split("/")) < parts:
            raise ValueError(f"{path}, line {number} is {printable(line)[:100]!r}; expected {expected}.")
        found.append(line)
    if not found:
        raise ValueError(f"{path} is empty; expected lines {expected}.")
    if len(set(found)) < len(found):
        twice = next(line for place, line in enumerate(sorted(found)[1:], 1) if sorted(found)[place - 1] == line)
        raise ValueError(f"{path} names {printable(twice)[:100]} more than once; expected each image once.")
    return found


def _noises(path: str) -> list[str]:
    """Lines that begin with # are remarks; of columns between tabs the second counts."""
    return [line.split("\t")[1 if "\t" in line else 0] for _, line in _lines(path) if not line.startswith("#")]


def _lines(path: str) -> list[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", opener=open_regular) as file:
            return [(number, line.strip()) for number, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); expected {_PROBES}, {_DISTRACTORS} and the folders facescrub_images and "
            "megaface_images, as InsightFace packs MegaFace."
        ) from error
