"""What docs/using-a-model.md says that nothing else tests."""

from __future__ import annotations

import os

from dali_loaders import open_source
from tests.test_docs import python_block


def test_the_three_lines(made, tmp_path, monkeypatch):
    source = open_source(made.data)
    for number in (1, 2):
        (tmp_path / f"anna-{number}.jpg").write_bytes(source.read(number))
    os.symlink(made.folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(python_block("using-a-model.md"), names)
    assert names["embeddings"].shape == (2, 16)
