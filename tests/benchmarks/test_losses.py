"""What the benchmarks on losses measure, and the page that shows it."""

from __future__ import annotations

import os
import tarfile

import pytest

from benchmarks import loss_cost, loss_page, training
from benchmarks.training_entries import CANDIDATES, ENTRIES
from partial_fc import losses
from pipeline.resolve import resolve


def test_every_loss_has_a_cost_and_the_text_names_it():
    rows = list(loss_cost.rows(sorted(losses.REGISTRY), classes=50, batch=8, width=8, dtype="float32", pairs=1))
    assert [row["loss"] for row in rows] == sorted(losses.REGISTRY)
    assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)
    assert loss_cost.as_text(rows[0]).startswith("adaface: ")


@pytest.mark.parametrize("change", [{"classes": 1}, {"batch": 7}, {"pairs": 0}])
def test_sizes_that_cannot_be_measured_are_refused(change):
    with pytest.raises(ValueError, match="--classes is"):
        list(loss_cost.rows(["cosface"], **{"classes": 50, "batch": 8, "width": 8, "dtype": "float32", "pairs": 1} | change))


def test_the_page_is_what_the_registry_says():
    with open(loss_page.PAGE) as file:
        assert file.read() == loss_page.page(), "run python -m benchmarks.loss_page"
    assert {cls.__module__.rpartition(".")[2] for cls in losses.REGISTRY.values() if cls.__module__.startswith("partial_fc")} == set(
        loss_page.FAMILIES
    )


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_are_settings_that_exist(entry):
    for candidate in CANDIDATES.get(entry, [()]):
        config = resolve("dogs_small", [*training.BUDGET, *ENTRIES[entry], *candidate])
        assert config.run.batch % config.data.images_per_identity == 0


def test_an_unknown_entry_is_refused():
    with pytest.raises(ValueError, match="there is no entry 'cosfaze': choose from cosface"):
        list(training.rows(["cosfaze"], [0], 1, tune=False))


def test_identities_are_carved_out_whole(tmp_path, monkeypatch):
    source = tmp_path / "dogs" / "train.tar"
    source.parent.mkdir()
    with tarfile.open(source, "w") as file:
        for identity in range(40):
            for image in range(3):
                member = tarfile.TarInfo(f"{identity:03}/{image}.jpg")
                file.addfile(member)
    monkeypatch.setenv("PROTOSHARD_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = []
    for path in training._carved():
        with tarfile.open(path) as file:
            names.append({os.path.dirname(name) for name in file.getnames()})
            assert len(file.getnames()) == 3 * len(names[-1])
    assert not names[0] & names[1] and len(names[0] | names[1]) == 40 and 2 <= len(names[1]) <= 16
