"""Which columns of Parquet files hold images and labels, and what the labels are called."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from dali_loaders.extras import extra

with extra("parquet"):
    import pyarrow as pa
    import pyarrow.compute as pc

_IMAGES = ("image", "images", "img", "imgs", "jpg", "jpeg", "png", "picture", "photo", "face")
_LABELS = (
    "label",
    "labels",
    "identity",
    "identity_id",
    "identities",
    "person",
    "person_id",
    "subject",
    "subject_id",
    "fine_label",
    "class",
    "cls",
)
_WEAK_LABELS = ("id", "name")  # often the number or name of the image itself, so only where nothing better is there


class Columns(NamedTuple):
    """bytes, path, label: paths of Parquet columns; `path` is "" where images are plain binary. names: of the classes, by number."""

    bytes: str
    path: str
    label: str
    label_type: str
    names: tuple[str, ...] | None


def find_columns(file: str, schema: pa.Schema, wanted: list[str]) -> Columns:
    """The columns `wanted` (image, label), or those found by type and usual names. ValueError lists the columns where that is not clear."""
    classes = _class_names(file, schema)
    images = [name for name in schema.names if _binary_within(schema.field(name).type) is not None]
    labels = [name for name in schema.names if _is_label(schema.field(name).type)]
    if wanted:
        image, label = _named(file, schema, images, wanted[0], "images"), _named(file, schema, labels, wanted[1], "labels")
    else:
        image = _only(images) or _only(_usual(images, _IMAGES)) or _unclear(file, schema, "images", images)
        labels = _usual(labels, _LABELS) or [name for name in labels if name in classes] or _usual(labels, _WEAK_LABELS)
        label = _only(labels) or _unclear(file, schema, "labels", labels)
    kind = schema.field(label).type
    text = "text" if pa.types.is_dictionary(kind) or not pa.types.is_integer(kind) else "whole numbers"
    inside = _binary_within(schema.field(image).type)
    if not inside:
        return Columns(image, "", label, text, classes.get(label))
    path = f"{image}.path" if schema.field(image).type.get_field_index("path") >= 0 else ""
    return Columns(f"{image}.{inside}", path, label, text, classes.get(label))


def read_labels(file: str, column: pa.ChunkedArray, columns: Columns) -> tuple[np.ndarray, list[Any], dict[str, np.ndarray]]:
    """Of a file's label column: places int64 [rows] in the list of its distinct labels, sorted; rows that have none, by the reason why,
    bool [rows]. Labels are names (str), or the numbers themselves (int) where the file gives no names."""
    null = np.asarray(column.is_null())
    if columns.label_type == "text":
        text = column.cast(pa.large_string()).cast(pa.large_binary()).fill_null(b"").combine_chunks()
        coded = pc.dictionary_encode(text)
        labels = [label.decode(errors="surrogateescape") for label in coded.dictionary.to_pylist()]
        places = np.asarray(coded.indices).astype(np.int64)
        without = {"null label": null, "empty label": (np.asarray(pc.equal(text, b"")) & ~null)}
    else:
        numbers, places = np.unique(np.asarray(column.fill_null(0)), return_inverse=True)
        labels = numbers.tolist()
        without = {"null label": null, "negative label": numbers[places] < 0} if labels else {}
        if columns.names is not None:
            if labels and labels[-1] >= len(columns.names):
                name = columns.label
                raise ValueError(
                    f"{file}: column {name!r} holds the label {labels[-1]}, but names of {len(columns.names)} classes; export it again."
                )
            labels = [columns.names[label] if label >= 0 else "" for label in labels]
    return places, labels, without


def _class_names(file: str, schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Names of the classes of each ClassLabel column, as Hugging Face datasets writes them into the schema."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"].get("features") or {} if text else {}
        named = {name: feature for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}
        classes = {name: tuple(map(str, feature["names"])) for name, feature in named.items() if feature.get("names") is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: the description of its features by Hugging Face datasets cannot be read ({error}); export it again."
        ) from error
    for name, names in classes.items():
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: two classes of column {name!r} have the same name; export it again with distinct names.")
    return classes


def _binary_within(kind: pa.DataType) -> str | None:
    """The field of a struct of images that holds their bytes, "" for plain binary, None where a column holds no images."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return "bytes" if place >= 0 and _is_binary(kind.field(place).type) else None
    return "" if _is_binary(kind) else None


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_integer(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _usual(names: list[str], usual: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.lower() in usual]


def _only(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ""


def _named(file: str, schema: pa.Schema, fitting: list[str], name: str, what: str) -> str:
    if name in fitting:
        return name
    found = f"is of type {schema.field(name).type}" if name in schema.names else "does not exist"
    raise ValueError(f"{file}: column {name!r}, named for the {what}, {found}; its columns are {_listed(schema)}.")


def _unclear(file: str, schema: pa.Schema, what: str, candidates: list[str]) -> str:
    why = f"columns {', '.join(candidates)} could all hold" if candidates else "no column is known to hold"
    raise ValueError(f"{file}: {why} the {what}; name them as in PATH#image:label. Its columns are {_listed(schema)}.")


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
