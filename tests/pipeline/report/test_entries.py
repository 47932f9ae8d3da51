"""Which run is best, and whether the page may say so."""

from __future__ import annotations

import pytest

from pipeline.report.cells import title_of
from pipeline.report.entries import Entry, are_of_one_set, best_of, by_set, main_figures
from pipeline.report.run_files import Evaluation, RunFiles


def entry(label, value, interval=None, figure="eer", run=None, of=None):
    one = Evaluation(1, {figure: value}, {figure: interval} if interval else {}, {}, of)
    return Entry(label, run or RunFiles(label, label), run is not None, [one], {}, {})


@pytest.mark.parametrize(
    ("figure", "values", "best", "is_clear"),
    [
        ("eer", {"a": (0.1, 0.09, 0.11), "b": (0.2, 0.18, 0.22)}, "a", True),
        ("eer", {"a": (0.1, 0.09, 0.19), "b": (0.2, 0.18, 0.22)}, "a", False),
        ("rank1", {"a": (0.1, 0.09, 0.11), "b": (0.2, 0.18, 0.22)}, "b", True),
        ("tar_at_far/1e-3", {"a": (0.1, 0.09, 0.11), "b": (0.2, 0.18, 0.22), "c": (0.19, 0.1, 0.2)}, "b", False),
        ("men/fnmr_at_fmr/1e-3", {"a": (0.1, 0.09, 0.11), "b": (0.2, 0.18, 0.22)}, "a", True),
        ("eer", {"a": (0.1, 0.09, 0.11), "b": (0.1, 0.18, 0.22)}, None, None),
        ("images", {"a": (1, 1, 1), "b": (2, 2, 2)}, None, None),
        ("eer", {"a": (0.1, 0.09, 0.11)}, None, None),
    ],
)
def test_best(figure, values, best, is_clear):
    found = best_of(figure, [entry(name, value, ends, figure) for name, (value, *ends) in values.items()])
    assert (found and found.entry.label, found and found.is_clear) == (best, is_clear)


def test_without_intervals_of_all_nothing_is_clear():
    found = best_of("eer", [entry("a", 0.1, (0.09, 0.11)), entry("b", 0.2)])
    assert found.entry.label == "a" and not found.is_clear and not found.has_intervals


def test_averaged_weights_do_not_hide_that_a_run_is_better_than_another():
    a, b = entry("a", 0.1, (0.09, 0.11)), entry("b", 0.2, (0.18, 0.22))
    averaged = entry("a (averaged)", 0.101, (0.09, 0.11), run=a.run)
    found = best_of("eer", [a, averaged, b])
    assert found.entry is a and found.is_clear
    assert not best_of("eer", [a, averaged]).is_clear


def test_sets_are_the_same_wherever_they_lie():
    of = {"path": "/a/test.tar", "bytes": 5, "labels": "x", "flip": True}
    a = entry("a", 0.1, of=of)
    assert are_of_one_set([a, entry("b", 0.2, of=of | {"path": "/b/test.tar", "bytes": 6})])
    assert not are_of_one_set([a, entry("b", 0.2, of=of | {"flip": False})])
    assert are_of_one_set([a, entry("old", 0.2)])  # of sizes that are equal, because there are none


def test_averaged_weights_are_entries_of_the_set_itself():
    run = RunFiles("r", "r", evaluations={"test": [Evaluation(1, {})], "test_ema": [Evaluation(1, {})], "x_ema": [Evaluation(1, {})]})
    found = {name: [(one.label, one.is_averaged) for one in entries] for name, entries in by_set([run]).items()}
    assert found == {"test": [("r", False), ("r (averaged weights)", True)], "x_ema": [("r", False)]}


def test_figures_of_a_protocol_that_has_others():
    one = Entry(
        "a", RunFiles("a", "a"), False, [Evaluation(1, {"top1": 0.5, "fpir_at_x": 0.1, "probes": 3, "fnmr_at_fmr/1e-1": 0})], {}, {}
    )
    assert main_figures([one]) == ["top1", "fpir_at_x"]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("tar_at_far/1e-3", "TAR at FAR 1e-3"),
        ("tpir_at_fpir/0.01", "TPIR at FPIR 0.01"),
        ("threshold_at_fpir/0.1", "threshold at FPIR 0.1"),
        ("tar_at_common", "tar at common"),
        ("eer", "EER"),
        ("odd/name", "odd/name"),
    ],
)
def test_titles_of_figures(name, title):
    assert title_of(name) == title
