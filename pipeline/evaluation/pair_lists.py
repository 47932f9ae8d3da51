"""Lists of pairs as face sets publish them: LFW's pairs.txt, and the lists of CALFW and CPLFW."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dali_loaders.names import printable
from dali_loaders.regular import open_regular

_LOWER = (".jpg", ".png", ".jpeg", ".webp", ".bmp")
IMAGE_EXTENSIONS = (*_LOWER, *map(str.upper, _LOWER))  # aligned copies of LFW have other ones than the originals
_EXPECTED = "expected LFW's lines (name i j, or name i name j) or CALFW's and CPLFW's (image label, two lines a pair)"
_SHOWN = 3
REMEDY = {
    True: " --allow-missing leaves their pairs out.",
    False: " Name the folder where they are with --images.",
}  # whether some are there


@dataclass(frozen=True)
class PairList:
    """Pairs of image names, without folders, whether they show one person, and their folds, which are contiguous."""

    pairs: list[tuple[str, str]]
    issame: list[bool]
    folds: int


def read_list(path: str) -> PairList:
    """ValueError, with the line, for what is in neither form, and where a list does not hold as many pairs as its first line says."""
    try:
        with open(path, encoding="utf-8-sig", opener=open_regular) as file:
            lines = [(number, line.split()) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list of pairs ({getattr(error, 'strerror', None) or error}); {_EXPECTED}.") from error
    if not lines:
        raise ValueError(f"{path} is empty; {_EXPECTED}.")
    fields = lines[0][1]
    if _is_header(fields) or len(fields) in (3, 4):
        return _lfw(path, lines)
    return _two_lines_a_pair(path, lines)


def _is_header(fields: list[str]) -> bool:
    """Names may be numbers too."""
    return len(fields) < 3 and all(field.isdecimal() for field in fields)


def _lfw(path: str, lines: list[tuple[int, list[str]]]) -> PairList:
    """The first line is "folds n", n genuine and n impostor pairs in each fold; or n alone, for one fold. Some copies have none, as RFW's
    lists: they are in ten folds where each tenth has as many genuine pairs as the others."""
    folds, each = 1, None
    if _is_header(lines[0][1]):
        *several, each = map(int, lines[0][1])
        folds = several[0] if several else 1
        lines = lines[1:]
    pairs, issame = [], []
    for number, fields in lines:
        if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal() and int(fields[1]) != int(fields[2]):
            names = (fields[0], fields[1]), (fields[0], fields[2])
        elif len(fields) == 4 and fields[1].isdecimal() and fields[3].isdecimal() and fields[0] != fields[2]:
            names = (fields[0], fields[1]), (fields[2], fields[3])
        else:
            raise ValueError(f"{path}, line {number} is {' '.join(fields)!r}; expected name i j, or name i other_name j.")
        pairs.append((_numbered(*names[0]), _numbered(*names[1])))
        issame.append(len(fields) == 3)
    if each is not None and (issame.count(True), issame.count(False)) != (folds * each, folds * each):
        raise ValueError(
            f"{path} has {issame.count(True)} genuine and {issame.count(False)} impostor pairs, but its first line says {folds * each} of "
            "each; copy the list again."
        )
    if each is None and len(issame) % 10 == 0 and len(set(np.reshape(issame, (10, -1)).sum(axis=1))) == 1:
        folds = 10
    return PairList(pairs, issame, folds)


def _numbered(name: str, number: str) -> str:
    return f"{name}_{int(number):04d}"


def _two_lines_a_pair(path: str, lines: list[tuple[int, list[str]]]) -> PairList:
    """Label 0 is an impostor pair; any other a genuine one, and its fold where there are several (CALFW: 1 to 10).

    All genuine pairs come first, and the impostors' folds are not told. So both are dealt to ten folds in their order, as LFW has them."""
    pairs: dict[bool, list[tuple[int, tuple[str, str]]]] = {True: [], False: []}
    for (number, first), second in zip(lines[::2], [fields for _, fields in lines[1::2]] + [[]], strict=False):
        if len(first) != 2 or len(second) != 2 or not first[1].isdecimal() or first[1] != second[1] or first[0] == second[0]:
            raise ValueError(
                f"{path}, line {number} is {' '.join(first)!r} and the next is {' '.join(second)!r}; expected two images with the same "
                "label, which is a number."
            )
        label = int(first[1])
        pairs[label > 0].append((label, (first[0], second[0])))
    genuine = [pair for _, pair in sorted(pairs[True], key=lambda labelled: labelled[0])]
    impostor = [pair for _, pair in pairs[False]]
    folds = 10
    ordered, issame = [], []
    for fold in range(folds):
        for kind, of_kind in ((True, genuine), (False, impostor)):
            part = of_kind[fold * len(of_kind) // folds : (fold + 1) * len(of_kind) // folds]
            ordered += part
            issame += [kind] * len(part)
    return PairList(ordered, issame, folds)


def find_images(listed: PairList, path: str, folder: str) -> list[str]:
    """Files of both images of every pair, as `find` has them. ValueError, with their number, where some are missing."""
    found = find(listed, path, folder)
    return [found[name] for pair in listed.pairs for name in pair]


def find(listed: PairList, path: str, folder: str, allow_missing: bool | None = None) -> dict[str, str]:
    """The file of each name: FOLDER/NAME/NAME_0001.jpg, as LFW has them, or FOLDER/NAME_0001.jpg, as CALFW and CPLFW; or with other
    extensions. A name with folders is one below FOLDER.

    ValueError, with their number, where some are missing, unless `allow_missing`, and where all are. None: there is no such option."""
    outside = next((name for pair in listed.pairs for name in pair if name.startswith("/") or ".." in name.split("/")), None)
    if outside is not None:
        raise ValueError(
            f"{path} names {printable(outside)[:100]}, which lies outside {folder}: a list may name files of its folder alone."
        )
    found, missing = {}, []
    for name in dict.fromkeys(name for pair in listed.pairs for name in pair):
        file = next((file for file in _places(folder, name) if os.path.isfile(file)), None)
        if file is None:
            missing.append(name)
        else:
            found[name] = file
    if missing and not (allow_missing and found):
        first = ", ".join(map(printable, missing[:_SHOWN])) + ", ..." * (len(missing) > _SHOWN)
        remedy = "" if allow_missing is None else REMEDY[bool(found)]
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(found) + len(missing)} images of {path} ({first}): looked for "
            f"{os.path.join(folder, printable(missing[0]))}, and in folders of the persons' names; a score on fewer pairs could not be "
            f"compared.{remedy}"
        )
    return found


def _places(folder: str, name: str) -> Iterator[str]:
    stem, extension = os.path.splitext(name)
    if extension.lower() not in IMAGE_EXTENSIONS:
        stem, extension = name, ""
    person = stem.rpartition("_")[0]
    for ending in dict.fromkeys(filter(None, [extension, *IMAGE_EXTENSIONS])):
        for place in (os.path.join(person, stem), stem):
            yield os.path.join(folder, place + ending)


def balanced(listed: PairList) -> list[int]:
    """The order of the pairs for a protocol that cuts them into ten: that of the list where its folds are those ten; otherwise genuine
    and impostor pairs in turn, so that no part has one kind only."""
    if listed.folds % 10 == 0:
        return list(range(len(listed.pairs)))
    same = np.array(listed.issame)
    places = np.empty(len(same))
    for kind in (True, False):
        of_kind = np.flatnonzero(same == kind)
        places[of_kind] = (np.arange(len(of_kind)) + 0.5) / max(1, len(of_kind))
    return np.argsort(places, kind="stable").tolist()
