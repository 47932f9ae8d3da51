"""What a model takes and gives, as `config.json` of its folder says it. A file may come from anyone, so every value is checked."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from dali_loaders.names import printable
from dali_loaders.regular import open_regular
from pipeline.backbones import BackboneConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # as the Hugging Face hub calls them
FORMAT, VERSION = "protoshard model", 1
PIXELS = {"colors": "rgb", "mean": 127.5, "std": 127.5}  # what every network of this project takes
_MOST = 1 << 20  # bytes of a config.json, which has 2,000
_WIDEST, _LARGEST = 1 << 16, 1 << 12  # features; pixels of a side
_FAR = re.compile(r"1e-\d{1,2}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Thresholds:
    """Cosines from which on a pair is accepted, by the share of impostor pairs of `set` that are accepted then ("1e-3")."""

    set: str
    cosine_at_far: dict[str, float]

    def __post_init__(self) -> None:
        _expect(isinstance(self.set, str) and 0 < len(self.set) < 1000, "thresholds.set", self.set, "the name of a set")
        _expect(isinstance(self.cosine_at_far, dict), "thresholds.cosine_at_far", self.cosine_at_far, "cosines by FAR")
        for far, cosine in self.cosine_at_far.items():
            _expect(_FAR.fullmatch(far) is not None, "thresholds.cosine_at_far", far, "names of FARs such as 1e-3")
            _expect(_is_number(cosine) and -1.01 <= cosine <= 1.01, f"thresholds.cosine_at_far.{far}", cosine, "a cosine")


@dataclass(frozen=True)
class Description:
    """landmarks: x and y, in pixels of the image, of the five points to which faces are brought; None where images are no aligned faces
    flip: whether the features of the mirror image are added before the normalisation
    batch_size: images of a forward pass, as the run evaluated; other numbers may change the last bits
    weights: SHA-256 of all weights and buffers (`digest_of` in loading.py), by which they are known in every file
    origin: where the weights come from, for people: step, identities, checkpoint"""

    backbone: BackboneConfig
    image_size: int
    weights: str
    landmarks: tuple[tuple[float, float], ...] | None = None
    flip: bool = True
    batch_size: int = 64
    thresholds: Thresholds | None = None
    origin: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _expect(_is_whole(self.image_size, _LARGEST), "image_size", self.image_size, f"pixels, from 1 to {_LARGEST}")
        _expect(self.backbone.width <= _WIDEST, "backbone.width", self.backbone.width, f"at most {_WIDEST} features")
        _expect(_is_whole(self.batch_size, 1 << 16), "batch_size", self.batch_size, "a number of images from 1 to 65536")
        _expect(isinstance(self.flip, bool), "flip", self.flip, "true or false")
        _expect(isinstance(self.weights, str) and bool(_SHA256.fullmatch(self.weights)), "weights", self.weights, "a SHA-256")
        points = self.landmarks
        are_points = points is None or (len(points) == 5 and all(len(point) == 2 and all(map(_is_number, point)) for point in points))
        _expect(are_points, "landmarks", points, "five points [x, y], or null")
        _expect(self.origin is None or isinstance(self.origin, dict), "origin", self.origin, "a section, or null")

    def as_json(self) -> str:
        head = {"format": FORMAT, "version": VERSION, "library_name": "protoshard"}
        return json.dumps({**head, **asdict(self), **PIXELS}, indent=2, allow_nan=False) + "\n"

    def named_threshold(self, far: str, path: str) -> float:
        """The cosine from which on a pair is accepted at that FAR. ValueError where the model has none."""
        if self.thresholds is None or not self.thresholds.cosine_at_far:
            raise ValueError(
                f"{path} has no thresholds, so nothing can be decided at FAR {far}: export it again with --data SET, a labelled set of "
                "identities that it was not trained on"
            )
        if far not in self.thresholds.cosine_at_far:
            known = ", ".join(self.thresholds.cosine_at_far)
            raise ValueError(
                f"{path} has no threshold at FAR {far}, only at {known} of {printable(self.thresholds.set)}: choose one of these"
            )
        return self.thresholds.cosine_at_far[far]


def read(folder: str) -> Description:
    """Of the model in `folder`. ValueError, with a sentence, for whatever is no description that this version knows."""
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, "rb", opener=open_regular) as file:
            content = file.read(_MOST + 1)
    except OSError as error:
        whole = "an export is whole only with it" if isinstance(error, FileNotFoundError) else "check its permissions"
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): {whole}") from error
    try:
        return _from_json(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model of protoshard: {printable(str(error))[:300]}") from error


def _from_json(content: bytes) -> Description:
    if len(content) > _MOST:
        raise ValueError(f"it has more than {_MOST} bytes")
    values = json.loads(content)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    if values.get("version") != VERSION:
        raise ValueError(f"it is of version {values.get('version')!r}, and this protoshard knows {VERSION}")
    for name, known in PIXELS.items():
        _expect(values.get(name) == known, name, values.get(name), repr(known))
    given = {item.name: values[item.name] for item in fields(Description) if item.name in values}
    for name in ("backbone", "image_size", "weights"):
        _expect(name in given, name, None, "a value")
    given["backbone"] = _backbone(given["backbone"])
    if isinstance(given.get("landmarks"), list):
        given["landmarks"] = tuple(tuple(point) if isinstance(point, list) else () for point in given["landmarks"])
    if given.get("thresholds") is not None:
        said = given["thresholds"]
        _expect(isinstance(said, dict) and said.keys() == {"set", "cosine_at_far"}, "thresholds", said, "set and cosine_at_far")
        given["thresholds"] = Thresholds(**said)
    return Description(**given)


def _backbone(values: Any) -> BackboneConfig:
    _expect(isinstance(values, dict), "backbone", values, "a section")
    known = {item.name: item.default for item in fields(BackboneConfig)}
    for name, value in values.items():
        _expect(name in known, f"backbone.{name}", value, f"one of {', '.join(known)}")
        is_right = _is_number(value) if isinstance(known[name], float) else type(value) is type(known[name])
        _expect(is_right, f"backbone.{name}", value, f"a value like {known[name]!r}")
    return BackboneConfig(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {printable(repr(value))[:100]}, but must be {expected}")
