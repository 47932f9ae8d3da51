"""README.md of an exported model: what it was trained on, how good it is, and what it must not be used for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dali_loaders.names import printable
from dali_loaders.remote import without_secrets
from pipeline.export.description import Description

FILE = "README.md"
UNSTATED = "not stated: fill this in before you give the model away"


def text(about: Description, info: Mapping[str, Any], figures: Mapping[str, str], files: Mapping[str, str]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    info: of the checkpoint
    figures: of evaluations, by name, with their intervals where there are any
    files: what each file of the folder is"""
    data, loss = (_section(info, name) for name in ("data", "loss"))
    network, trained_on = about.backbone, _names_of(data.get("train"))
    origin = about.origin or {}
    ema = ", their running average" if origin.get("ema") else ""
    sections = [
        "---\nlicense: unknown\nlibrary_name: protoshard\npipeline_tag: image-feature-extraction\ntags:\n- open-set-recognition\n"
        "- embeddings\n---",
        f"# {_shown(network.name)}, {network.width} features",
        f"A network that maps images of {about.image_size} x {about.image_size} pixels to {network.width} numbers, in which images of the "
        "same identity lie closer together than those of different ones. Trained with protoshard.",
        '## Use\n```python\nfrom pipeline.export import load\n\nmodel = load("FOLDER")\nembeddings = model.embed(["a.jpg", "b.jpg"])\n```',
        f"Images: RGB, (x - 127.5) / 127.5{_landmarks(about)} The features of the mirror image are "
        f"{'added' if about.flip else 'not added'}; then the sum is normalised. Pairs are compared by cosine.",
        _table("file", "content", files.items()),
        "## Training\n"
        + _table(
            "what",
            "value",
            [
                ("data", trained_on or UNSTATED),
                ("identities", _shown(info.get("num_classes")) or UNSTATED),
                ("loss", _shown(loss.get("name")) or UNSTATED),
                ("weights", f"step {_shown(info.get('step'))}, epoch {_number(info.get('epoch'))}{ema}"),
                ("SHA-256 of the weights", about.weights),
            ],
        ),
        "## Figures\n" + _figures(figures),
        "## Thresholds\n" + _thresholds(about),
        "## Licence\n"
        + _table("of", "licence", [("the weights", UNSTATED), ("the training data", UNSTATED), ("consent of the people shown", UNSTATED)]),
        LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


LIMITS = """## Limits of use
- Embeddings of faces are biometric data. Many laws ask for a legal ground and for consent before they are computed or kept, among them
  the GDPR (Article 9) in the EU and BIPA in Illinois.
- A figure holds for images like those of its set. Light, cameras, age and groups of people that the training data lack can raise the
  error rates many times over: measure them on your own data, and per group, before you rely on them.
- A threshold holds for the set that it was measured on, and a FAR per comparison is not one per search: among N people N comparisons can
  go wrong.
- Do not let it decide alone about a person, and do not use it to watch people without their knowledge, or to infer a person's origin,
  health, belief or character."""


def _landmarks(about: Description) -> str:
    if about.landmarks is None:
        return "."
    points = ", ".join(f"({x:g}, {y:g})" for x, y in about.landmarks)
    return f"; faces aligned so that eyes, nose and corners of the mouth come to {points}."


def _thresholds(about: Description) -> str:
    if about.thresholds is None:
        return "None: export with `--data SET` to measure them."
    rows = [(far, f"{cosine:.4f}") for far, cosine in about.thresholds.cosine_at_far.items()]
    return _table(f"FAR on {_shown(about.thresholds.set)}", "cosine from which on a pair is accepted", rows)


def _figures(figures: Mapping[str, str]) -> str:
    if not figures:
        return "None were measured when these weights were saved."
    if any(value.endswith(")") for value in figures.values()):
        said = "In brackets: the 95 % interval of a bootstrap over identities (over pairs, where the set is one of pairs)."
    else:
        said = "Without intervals: `protoshard export --data SET` gives them, for sets of 10 identities to 2,236 images."
    return _table("figure", "value", figures.items()) + "\n\n" + said


def _section(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of a checkpoint's configuration, which may come from anyone."""
    found = info.get("config", {}).get(name)
    return found if isinstance(found, dict) else {}


def _names_of(data: Any) -> str:
    """Of the sets that a run was trained on, without the folders of the machine on which they lie."""
    return ", ".join(os.path.basename(path.strip().rstrip("/")) for path in data.split(",")) if isinstance(data, str) else ""


def _table(left: str, right: str, rows: Any) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {_shown(name)} | {_shown(value)} |" for name, value in rows)])


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else _shown(value)


def _shown(value: Any) -> str:
    """On one line, without secrets of addresses, and without what would end a cell of a table or be HTML."""
    return "" if value is None else printable(without_secrets(str(value))).replace("|", "\\|").replace("<", "&lt;")[:300]
