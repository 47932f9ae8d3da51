"""`protoshard data pairs`: a `.bin` pair set of random pairs of a labelled set, or of a published list of pairs."""

from __future__ import annotations

import logging

import numpy as np

from dali_loaders import open_source
from dali_loaders.account import ReadError
from dali_loaders.packing.alignment import SIDE
from dali_loaders.packing.images import Images
from dali_loaders.packing.landmarks import read_landmarks, relative_names
from dali_loaders.packing.reading import in_order, worker_count
from dali_loaders.sources import Source
from pipeline.evaluation.bin_pairs import write_bin
from pipeline.evaluation.listed_files import ListedFiles
from pipeline.evaluation.pair_lists import balanced, find_images, read_list
from pipeline.evaluation.random_pairs import random_pairs

log = logging.getLogger(__name__)


def pairs_of_set(data: str, out: str, folds: int = 10, each: int = 300, seed: int = 0, landmarks: str = "") -> str:
    """Writes random pairs of a labelled set to OUT.bin, and says in one line what is in it.

    Images that cannot be read take no part; they are named in the log. landmarks: CSV file by which faces are cut out (see `pack`).
    ValueError where the set has too few pairs."""
    for name, value, least in (("folds", folds, 1), ("pairs", each, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{name} is {value}; expected at least {least}.")
    _check_name(out)
    source = open_source(data)
    images = _images(source, landmarks)
    usable = np.arange(len(source))
    while True:
        drawn = random_pairs(source.labels[usable], folds, each, seed, data)
        numbers = usable[drawn.pairs].ravel()
        needed = np.unique(numbers)
        read = dict(zip(needed.tolist(), in_order(images, needed, worker_count(0)), strict=True))
        broken = {number: error for number, error in read.items() if isinstance(error, ReadError)}
        if not broken:
            break
        first = next(iter(broken))
        log.warning("%d images cannot be read and take no part: %s (%s), ...", len(broken), source.name(first), broken[first])
        usable = np.setdiff1d(usable, list(broken))
    if not drawn.disjoint:
        log.warning("%s has too few identities for folds that share none: thresholds are chosen on persons that they judge", data)
    write_bin(out, [read[number] for number in numbers.tolist()], drawn.issame)
    return f"{len(drawn.issame)} pairs in {folds} folds in {out}, {int(drawn.issame.sum())} of them genuine"


def pairs_of_list(path: str, folder: str, out: str, landmarks: str = "") -> str:
    """Writes the pairs of a published list, whose images lie in `folder`, to OUT.bin, and says in one line what is in it.

    ValueError for a list that cannot be understood, and for images that are missing or cannot be read."""
    _check_name(out)
    listed = read_list(path)
    order = balanced(listed)
    files = find_images(listed, path, folder)
    source = ListedFiles(folder, list(dict.fromkeys(files)))
    read = dict(zip(source.files, in_order(_images(source, landmarks), np.arange(len(source)), worker_count(0)), strict=True))
    broken = {file: image for file, image in read.items() if isinstance(image, ReadError)}
    if broken:
        first = next(iter(broken))
        raise ValueError(
            f"{len(broken)} of the {len(read)} images of {path} cannot be used: {first} ({broken[first]}), ...; a score on fewer pairs "
            "could not be compared."
        )
    images = [read[file] for pair in order for file in files[2 * pair : 2 * pair + 2]]
    issame = [listed.issame[pair] for pair in order]
    write_bin(out, images, issame)  # type: ignore[arg-type]  # no error is left among them
    return f"{len(issame)} pairs in {listed.folds} folds in {out}, {sum(issame)} of them genuine"


def _images(source: Source, landmarks: str) -> Images:
    """With landmarks the faces are cut out; otherwise the bytes stay as they are."""
    if not landmarks:
        return Images(source, side=0, quality=95, decodes=True, landmarks=None, names=())
    names, points = relative_names(source), read_landmarks(landmarks, source.path)
    points.without_image(names)
    return Images(source, SIDE, 95, True, points, names)


def _check_name(out: str) -> None:
    if not out.endswith(".bin"):
        raise ValueError(f"the pair set would be named {out}; give it a name that ends in .bin.")
