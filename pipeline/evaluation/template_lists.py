"""The lists of IJB-B and IJB-C in InsightFace's packing: which image belongs to which template and media, landmarks, pairs, subjects."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dali_loaders.names import printable
from dali_loaders.progress import progress
from dali_loaders.regular import open_regular

_FACES = "NAME TEMPLATE MEDIA"
_POINTS = "NAME x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 SCORE"
_PAIRS = "TEMPLATE TEMPLATE LABEL, with 1 for one person and 0 for two"
_SUBJECTS = "a line of headings, then TEMPLATE_ID,SUBJECT_ID,..."
_GALLERIES = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}


@dataclass(frozen=True, eq=False)
class TemplateLists:
    """Ids of templates are those of the files."""

    names: list[str]  # N images
    template_N: np.ndarray  # int64
    media_N: np.ndarray  # int64
    points_N52: np.ndarray  # float64, x and y in pixels
    score_N: np.ndarray  # float64, the detector's
    first_P: np.ndarray  # int32, templates of P pairs
    second_P: np.ndarray
    same_P: np.ndarray  # bool
    gallery: tuple[np.ndarray, np.ndarray] | None  # int64, templates and their subjects; None: there are no lists for 1:N
    probes: tuple[np.ndarray, np.ndarray] | None

    def only(self, keep_N: np.ndarray) -> TemplateLists:
        """Of those images alone, bool [N] or their numbers; pairs and subjects stay."""
        numbers = np.arange(len(self.names))[keep_N]
        names = [self.names[number] for number in numbers.tolist()]
        parts = {key: getattr(self, key)[numbers] for key in ("template_N", "media_N", "points_N52", "score_N")}
        return replace(self, names=names, **parts)


def read_lists(folder: str, allow_missing: bool = False) -> TemplateLists:
    """Those of `folder`/meta. ValueError, with file and line, for what is in another form or does not fit together. `allow_missing`: images
    without landmarks are left out, and templates without images may be named."""
    meta = os.path.join(folder, "meta")
    there = [target for target in _GALLERIES if os.path.isfile(os.path.join(meta, f"{target}_face_tid_mid.txt"))]
    if len(there) != 1:
        found = "both" if there else "none"
        raise ValueError(
            f"{meta} has {found} of ijbb_face_tid_mid.txt and ijbc_face_tid_mid.txt; expected one of them, in a folder with loose_crop and "
            "meta as InsightFace packs IJB-B or IJB-C."
        )
    path = os.path.join(meta, there[0] + "_{}")
    names, template_N, media_N = _faces(path.format("face_tid_mid.txt"))
    numbers, points_N52, score_N = _points(path.format("name_5pts_score.txt"), names, allow_missing)
    first_P, second_P, same_P = _pairs(path.format("template_pair_label.txt"))
    lists = TemplateLists(names, template_N, media_N, points_N52, score_N, first_P, second_P, same_P, None, None).only(numbers)
    galleries, probes = [path.format(f"1N_gallery_{part}.csv") for part in _GALLERIES[there[0]]], path.format("1N_probe_mixed.csv")
    files = [*galleries, probes]
    missing = [file for file in files if not os.path.isfile(file)]
    if 0 < len(missing) < len(files):
        raise ValueError(
            f"{missing[0]} is missing: 1:N needs {', '.join(map(os.path.basename, files))}; without all of them it is left out."
        )
    if not missing:
        parts, of_probes = [_subjects(file) for file in galleries], _subjects(probes)
        gallery = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        gallery = _one_subject_each(gallery, of_probes, [*galleries, probes])
        _check_subjects(gallery[1], of_probes[1], galleries, probes)
        lists = replace(lists, gallery=gallery, probes=of_probes)
    known = np.unique(lists.template_N)
    of_files = {path.format("template_pair_label.txt"): np.concatenate([first_P, second_P])}
    of_files |= {file: part[0] for file, part in ((galleries[0], lists.gallery), (probes, lists.probes)) if part}
    for file, ids in of_files.items():
        unknown = np.setdiff1d(ids, known)
        if len(unknown) and not allow_missing:
            raise ValueError(
                f"{file} names {len(unknown)} templates that no line of {path.format('face_tid_mid.txt')} gives an image, such as "
                f"{unknown[0]}; copy both lists again. --allow-missing leaves out what needs them."
            )
    return lists


def _faces(path: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    names, ids = [], []
    for number, line in _lines(path, _FACES):
        fields = line.split()
        try:
            name, template, media = fields
            ids.append((int(template), int(media)))
        except ValueError as error:
            raise _no_line(path, number, line, _FACES) from error
        names.append(name)
    template_N, media_N = _int64(ids, path).T
    return names, template_N, media_N


def _points(path: str, names: list[str], allow_missing: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the images that have landmarks; landmarks and scores of all images. A line is that of the image with its name; where a
    name comes again, as often in both lists and in the same order, that of its turn. A line of no image is refused: the list of images
    may be cut off, and its last template would lack some."""
    found, rows = [], []
    for number, line in _lines(path, _POINTS):
        name, *fields = line.split()
        try:
            values = list(map(float, fields))
        except ValueError as error:
            raise _no_line(path, number, line, _POINTS) from error
        if len(values) != 11 or not np.isfinite(values).all():
            raise _no_line(path, number, line, _POINTS)
        found.append(name)
        rows.append(values)
    values_n = np.array(rows)
    if found == names:
        place_N = np.arange(len(names))
    else:
        place_of = {name: place for place, name in enumerate(found)}
        if len(place_of) < len(found):
            raise ValueError(f"{path} has several lines for one image, and not in the order of the list of faces; copy both lists again.")
        if (unused := place_of.keys() - set(names)) and not allow_missing:
            raise ValueError(
                f"{path} has landmarks of {len(unused)} images that the list of faces does not name, such as {printable(min(unused))[:100]}"
                "; copy both lists again. --allow-missing passes over them."
            )
        place_N = np.array([place_of.get(name, -1) for name in names])
    numbers = np.flatnonzero(place_N >= 0)
    if len(numbers) < len(names) and not (allow_missing and len(numbers)):
        without = [names[number] for number in np.flatnonzero(place_N < 0)]
        shown = ", ".join(map(printable, without[:3])) + ", ..." * (len(without) > 3)
        raise ValueError(
            f"{path} has no landmarks of {len(without)} of {len(names)} images ({shown}); expected a line {_POINTS} for each."
            + " --allow-missing leaves them out." * bool(len(numbers))
        )
    values_N = values_n[np.maximum(place_N, 0)]
    return numbers, values_N[:, :10].reshape(-1, 5, 2), values_N[:, 10]


def _pairs(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32 [P], int32 [P], bool [P]; 15,658,489 lines take two seconds."""
    try:
        # NumPy warns of numbers with fractions, or too large, and of an empty file.
        with open(path, encoding="utf-8-sig", opener=open_regular) as file, warnings.catch_warnings(action="error"):
            table_P3 = np.loadtxt(file, np.int32, comments=None, ndmin=2)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); expected lines {_PAIRS}.") from error
    except (ValueError, Warning) as error:
        raise _bad_pair(path, str(error)) from error
    if table_P3.shape[1] != 3 or ((table_P3[:, 2] != 0) & (table_P3[:, 2] != 1)).any():
        raise _bad_pair(path, "other columns")
    return np.ascontiguousarray(table_P3[:, 0]), np.ascontiguousarray(table_P3[:, 1]), table_P3[:, 2] == 1


def _bad_pair(path: str, reason: str) -> ValueError:
    """Names the first line that is no pair, which a fast reader does not."""
    for number, line in _lines(path, _PAIRS):
        fields = line.split()
        if len(fields) != 3 or fields[2] not in ("0", "1") or not all(map(str.isdecimal, fields)):
            return _no_line(path, number, line, _PAIRS)
    return ValueError(f"{path} cannot be read ({reason}); expected lines {_PAIRS}.")


def _subjects(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Templates, each once though the file has a line for each image, and their subjects, int64."""
    subject_of: dict[int, int] = {}
    for number, line in _lines(path, _SUBJECTS):
        row = next(csv.reader([line]))
        if number == 1:
            if len(row) > 1 and row[0].strip().isdecimal():
                raise ValueError(f"{path} begins with numbers, {printable(line)[:100]!r}; expected {_SUBJECTS}.")
            continue
        try:
            template, subject = int(row[0]), int(row[1])
        except (ValueError, IndexError) as error:
            raise _no_line(path, number, line, _SUBJECTS) from error
        if subject_of.setdefault(template, subject) != subject:
            raise ValueError(
                f"{path}, line {number} gives template {template} the subject {subject}, an earlier line {subject_of[template]}."
            )
    if not subject_of:
        raise ValueError(f"{path} names no template; expected {_SUBJECTS}.")
    template_n, subject_n = _int64(list(subject_of.items()), path).T
    return template_n, subject_n


def _int64(ids: list[tuple[int, int]], path: str) -> np.ndarray:
    try:
        return np.array(ids, np.int64)
    except OverflowError as error:
        raise ValueError(f"{path} has the number {max(map(max, ids))}, which is too large; expected numbers of 64 bits.") from error


def _one_subject_each(
    gallery: tuple[np.ndarray, np.ndarray], probes: tuple[np.ndarray, np.ndarray], files: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The gallery, with a template that both of its lists name once. ValueError where lists give one template two subjects."""
    templates, subjects = (np.concatenate(parts) for parts in zip(gallery, probes, strict=True))
    _, first, of = np.unique(templates, return_index=True, return_inverse=True)
    if len(other := np.flatnonzero(subjects[first][of] != subjects)):
        raise ValueError(
            f"{', '.join(files)} give template {templates[other[0]]} two subjects, {subjects[first][of][other[0]]} and "
            f"{subjects[other[0]]}; copy them again."
        )
    once = np.sort(np.unique(gallery[0], return_index=True)[1])
    return gallery[0][once], gallery[1][once]


def _check_subjects(gallery: np.ndarray, probes: np.ndarray, galleries: list[str], probe_path: str) -> None:
    """Each probe has one mate, or TPIR is none."""
    once, counts = np.unique(gallery, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{' and '.join(galleries)} have {counts.max()} templates of subject {once[counts.argmax()]}; expected one of each."
        )
    strangers = np.setdiff1d(probes, gallery)
    if len(strangers):
        raise ValueError(f"{probe_path} has {len(strangers)} subjects that are in no gallery, such as {strangers[0]}; expected none.")


def _lines(path: str, expected: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1. ValueError if there are none."""
    some = False
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", opener=open_regular) as file, progress(f"reading {path}") as done:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    some = True
                    yield number, line.strip()
                done.add()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); expected lines {expected}.") from error
    if not some:
        raise ValueError(f"{path} is empty; expected lines {expected}.")


def _no_line(path: str, number: int, line: str, expected: str) -> ValueError:
    return ValueError(f"{path}, line {number} is {printable(line)[:100]!r}; expected {expected}.")
