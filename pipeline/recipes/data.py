"""Where recipes look for their data sets."""

from __future__ import annotations

import os


def find_data(relative: str) -> str:
    """The path of a set: under the first of $PROTOSHARD_DATA, ./data and ../shared/data that has it; under ./data if none has."""
    roots = [os.environ.get("PROTOSHARD_DATA", ""), "data", os.path.join("..", "shared", "data")]
    paths = [os.path.join(root, relative) for root in roots if root]
    return next((path for path in paths if os.path.exists(path)), os.path.join("data", relative))
