"""The costs of augmentations, on a batch that says nothing of them."""

import pytest

from benchmarks import augment


def test_every_change_has_a_row(monkeypatch, capsys):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    for name, value in {"SIZE": 32, "BATCH": 8, "ROUNDS": 1}.items():
        monkeypatch.setattr(augment, name, value)
    augment.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(augment.CHANGES)
    assert all(float(cost) > 0 for row in rows for cost in row.strip("|").split("|")[1:])
    probabilities = {"geometry", "colour", "crop", "mask", "cutout", "blur", "low_resolution", "grey", "jpeg"}
    assert {probability for _, probability in augment.CHANGES.values()} == probabilities | {""}
