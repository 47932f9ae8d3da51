"""WebDataset's samples: members that share a key, which is the path up to the first dot of the file's name; KEY.jpg beside KEY.cls or
KEY.json, which hold the label."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from dali_loaders.account import Account, ReadError
from dali_loaders.names import printable
from dali_loaders.sources import by_name

FIELDS = ("label", "identity", "cls", "class", "id")  # of KEY.json, the first that is there
LAYOUT = f"KEY.jpg beside KEY.cls or KEY.json with a label ({', '.join(FIELDS)})"
LARGEST = 1 << 24  # bytes that are read of a member that holds a label


class NoLabelError(ValueError):
    """str() is why a sample has no label, a few words."""


def split(name: bytes) -> tuple[bytes, bytes]:
    """(key, extension without its dot, in lower case) of a member."""
    folder, slash, file = name.rpartition(b"/")
    key, _, extension = file.partition(b".")
    return folder + slash + key, extension.lower()


def label_members(names: Sequence[bytes]) -> dict[bytes, dict[bytes, int]]:
    """For each key the places of its .cls and .json."""
    found: dict[bytes, dict[bytes, int]] = {}
    for place, name in enumerate(names):
        if name[-5:].lower().endswith((b".cls", b".json")) and by_name.aside(name) is None:
            key, extension = split(name)
            if extension in (b"cls", b"json"):
                found.setdefault(key, {})[extension] = place
    return found


def identities_of(
    path: str,
    images: Sequence[bytes],
    members: dict[bytes, dict[bytes, int]],
    read: Callable[[int], bytes],
    account: Account,
) -> list[bytes | None] | None:
    """The identity of each of `images`, sorted; None for one that is passed over, or in place of them all if labels are not given so.

    Metadata in .json files beside images of identity folders make no samples: only a label does."""
    beside = {key: members[key] for key in (split(name)[0] for name in images) if key in members}
    labels: dict[bytes, bytes | NoLabelError] = {}
    for key, places in beside.items():
        try:
            labels[key] = _text_label(read(places[b"cls"])) if b"cls" in places else _json_label(read(places[b"json"]))
        except (NoLabelError, ReadError) as error:
            labels[key] = NoLabelError(str(error))
    has_cls = any(b"cls" in places for places in beside.values())
    if not has_cls and not any(isinstance(label, bytes) for label in labels.values()):
        return None
    if has_cls:
        labels |= _named({key: label for key, label in labels.items() if isinstance(label, bytes)}, beside, read)
    used: set[bytes] = set()
    identities: list[bytes | None] = []
    for name in images:
        key, extension = split(name)
        label = labels.get(key, NoLabelError("sample without a label"))
        if b"." in extension or key in used:
            why = "further image of a sample" if key in used else "second dot in the name of a sample's image"
            account.pass_over(why, printable(name))
            identities.append(None)
        elif isinstance(label, NoLabelError):
            account.pass_over(str(label), printable(name))
            identities.append(None)
        else:
            used.add(key)
            identities.append(label)
    if not has_cls:
        _check_folders(path, images, identities)
    for key in members.keys() - labels.keys():
        for extension in members[key]:
            account.pass_over("label without an image", printable(key + b"." + extension))
    return identities


def _named(labels: dict[bytes, bytes], members: dict[bytes, dict[bytes, int]], read: Callable[[int], bytes]) -> dict[bytes, bytes]:
    """The names that stand as "identity" in the .json of every sample, as `pack` writes them beside the number in .cls; nothing where
    some sample has none, or where names and numbers do not stand for each other."""
    names: dict[bytes, bytes] = {}
    for key in labels:
        try:
            names[key] = _json_label(read(members[key][b"json"]), ("identity",))
        except (KeyError, NoLabelError, ReadError):
            return {}
    pairs = {(labels[key], name) for key, name in names.items()}
    return names if len(pairs) == len(set(labels.values())) == len(set(names.values())) else {}


def in_order(identities: set[bytes]) -> list[bytes]:
    """By number where all are numbers, so that labels 0..C-1 stay as they are; else by name."""
    return sorted(identities, key=int) if all(re.fullmatch(rb"-?\d+", identity) for identity in identities) else sorted(identities)


def _text_label(content: bytes) -> bytes:
    label = content.strip()
    if re.fullmatch(rb"[+-]?\d{1,18}", label):
        return b"%d" % int(label)
    if not label or len(label) > 1000:
        raise NoLabelError("sample whose .cls holds no label")
    return label


def _json_label(content: bytes, fields_of_label: Sequence[str] = FIELDS) -> bytes:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NoLabelError("sample whose .json cannot be read") from error
    label = next((fields[field] for field in fields_of_label if field in fields), None) if isinstance(fields, dict) else None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str):
        try:
            encoded = label.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise NoLabelError("sample whose .json has a label that is no text") from error
        if encoded:
            return encoded
    elif isinstance(label, int) and not isinstance(label, bool) and abs(label) < 1 << 63:
        return b"%d" % label
    raise NoLabelError(f"sample whose .json has no label ({', '.join(FIELDS)})")


def _check_folders(path: str, images: Sequence[bytes], identities: Sequence[bytes | None]) -> None:
    """Refuses a set whose folders and whose .json files divide it in two ways: either may be what is meant."""
    pairs = {(name.rpartition(b"/")[0], identity) for name, identity in zip(images, identities, strict=True) if identity is not None}
    folders = {folder for folder, _ in pairs}
    if len(folders) > 1 and not len(pairs) == len(folders) == len({identity for _, identity in pairs}):
        raise ValueError(
            f"{printable(path)} names identities twice, by {len(folders)} folders and by a label in its .json members, and they differ: "
            f"take the .json members out (or rename their fields {', '.join(FIELDS)}), or put all images into one folder."
        )
