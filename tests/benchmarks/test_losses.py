"""What the benchmarks on losses measure, and the pages that show it."""

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


def test_the_pages_are_what_the_registry_says():
    for path, text in loss_page.pages().items():
        with open(path) as file:
            assert file.read() == text, f"{path} is out of date: run python -m benchmarks.loss_page"


def test_every_loss_belongs_to_a_family_with_a_title():
    found = [name for title, members in loss_page.families() for name in members if title]
    assert sorted(found) == sorted(name for name, cls in losses.REGISTRY.items() if cls.__module__.startswith("partial_fc."))


def test_needs_are_found_by_trying():
    assert loss_page.needs("cosface") == loss_page.needs("unpg") == []
    assert loss_page.needs("prototype_memory") == ["a bank of last features"]
    assert loss_page.needs("triplet") == ["several images of an identity in a batch"]
    assert loss_page.needs("frequency_margin") == ["class_counts"]
    assert loss_page.needs("magface") == ["feature norms"]


def test_of_a_setting_named_twice_the_last_counts():
    row = {"settings": 'loss=sum loss.parts=[{"name": "range", "k": 2}] data.images_per_identity=4 loss.k=1 loss.k=10'}
    assert loss_page.settings(row) == 'loss=sum loss.parts=[{"name": "range", "k": 2}] data.images_per_identity=4 loss.k=10'


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
