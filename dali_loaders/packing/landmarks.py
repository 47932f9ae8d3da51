"""Five landmarks of each image, from a CSV file: lines path,x1,y1,...,x5,y5, in the order of ArcFace's template."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np

from dali_loaders.names import printable
from dali_loaders.packing.alignment import is_mirrored
from dali_loaders.regular import open_regular
from dali_loaders.sources import Source

_COLUMNS = 11
_EXPECTED = "expected path,x1,y1,...,x5,y5: left eye, right eye, nose, left and right corner of the mouth, as they lie in the image"


class Landmarks:
    """points [n, 5, 2] of n lines, found by an image's path."""

    def __init__(self, path: str, points: dict[str, np.ndarray]) -> None:
        self.path = path
        self._points = points

    def __len__(self) -> int:
        return len(self._points)

    def of(self, name: str) -> np.ndarray | str:
        """Points float64 [5, 2] of the image with that path; why there are none, in a few words."""
        points = self._points.get(name)
        if points is None:
            return f"no landmarks in {os.path.basename(self.path)}"
        return points if np.isfinite(points).all() else "landmarks that are not finite"

    def without_image(self, names: Sequence[str]) -> list[str]:
        """Paths of the lines that name none of the images. ValueError if all do, or if most faces fit as mirror images only."""
        found = self._points.keys() & set(names)
        if not found:
            raise ValueError(
                f"{self.path}: none of its {len(self)} lines names an image of the set: its first is for {next(iter(self._points))}, but "
                f"the set's first image is {names[0]}; give paths below the set's folder."
            )
        faces = [points for points in (self._points[name] for name in sorted(found)[:1000]) if np.isfinite(points).all()]
        mirrored = sum(map(is_mirrored, faces))
        if 2 * mirrored > len(faces):
            raise ValueError(
                f"{self.path}: {mirrored} of {len(faces)} faces fit the template only as mirror images, so left and right are exchanged; "
                f"{_EXPECTED}."
            )
        return sorted(self._points.keys() - found)


def read_landmarks(path: str, folder: str) -> Landmarks:
    """The landmarks in a CSV file, with or without a line of headings, between commas, semicolons or tabs. Paths are those below the set's
    `folder`, or lead into it.

    ValueError, with the line, for what is no such line and for two different lines for one image. NaN, empty or infinite numbers stand
    for a face that was not found."""
    points: dict[str, np.ndarray] = {}
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="", opener=open_regular) as file:
            for line, row in enumerate(_rows(file), start=1):
                if not any(map(str.strip, row)) or (line == 1 and _is_heading(row)):
                    continue
                if len(row) != _COLUMNS:
                    raise ValueError(f"{path}, line {line} has {len(row)} columns; {_EXPECTED}.")
                name, numbers = printable(_below(row[0].strip(), folder)), _numbers(row[1:])
                if numbers is None:
                    raise ValueError(f"{path}, line {line} ({row[0]}) has a column that is no number; {_EXPECTED}.")
                if name in points and not np.array_equal(points[name], numbers, equal_nan=True):
                    raise ValueError(f"{path}, line {line} gives {row[0]} other landmarks than an earlier line; keep one face of an image.")
                points[name] = numbers
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({getattr(error, 'strerror', None) or error}); {_EXPECTED}.") from error
    if not points:
        raise ValueError(f"{path} holds no landmarks; {_EXPECTED}.")
    return Landmarks(path, points)


def relative_names(source: Source) -> list[str]:
    """Paths of a source's images below its folder or inside its tar, as landmarks name them."""
    before = printable(source.path.rstrip("/")) + "/", printable(os.path.basename(source.path)) + ":"
    names = []
    for index in range(len(source)):
        name = source.name(index)
        names.append(os.path.normpath(next((name.removeprefix(start) for start in before if name.startswith(start)), name)))
    return names


def _rows(file: TextIO) -> Iterator[list[str]]:
    """Between commas, or what spreadsheets write in their place; the first line tells."""
    first = file.readline()
    separator = next((sign for sign in ",;\t" if first.count(sign) == _COLUMNS - 1), ",")
    return csv.reader(itertools.chain([first], file), delimiter=separator)


def _below(path: str, folder: str) -> str:
    path = os.path.normpath(path)
    for start in (os.path.normpath(folder), os.path.abspath(folder), os.path.realpath(folder)):
        if path.startswith(start + os.sep):
            return path.removeprefix(start + os.sep)
    return path


def _numbers(columns: list[str]) -> np.ndarray | None:
    numbers = [_number(column) for column in columns]
    return None if None in numbers else np.array(numbers, np.float64).reshape(5, 2)


def _number(column: str) -> float | None:
    try:
        return float(column) if column.strip() else np.nan
    except ValueError:
        return None


def _is_heading(row: list[str]) -> bool:
    """A broken first line is not one: a heading has no number at all."""
    return len(row) > 1 and all(_number(column) is None for column in row[1:])
