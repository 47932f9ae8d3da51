"""Curves of a run over its evaluations and restarts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.evaluation.curves_so_far import MOST, CurvesSoFar, read

PAIRS = 255 * 128  # the sum of the histogram below


def report(eer, **groups):
    roc = np.array([0.0, eer, 1.0]), np.array([0.0, 1 - eer, 1.0])
    counts = {"genuine_histogram": np.arange(256), "impostor_histogram": np.arange(256) * 2}
    return SimpleNamespace(
        eer=eer, threshold_at_eer=eer / 2, genuine_pairs=PAIRS, impostor_pairs=2 * PAIRS, roc=roc, groups=groups, **counts
    )


def test_the_first_the_best_and_the_newest_are_drawn(tmp_path):
    curves = CurvesSoFar(tmp_path / "curves.npz")
    legends = [list(curves.with_newest(step, report(eer))) for step, eer in ((0, 0.5), (10, 0.2), (20, 0.1), (30, 0.15), (40, 0.3))]
    assert legends == [
        ["step 0"],
        ["step 0", "step 10"],
        ["step 0", "step 20"],
        ["step 0", "step 20, the best", "step 30"],
        ["step 0", "step 20, the best", "step 40"],
    ]


def test_they_are_the_same_after_any_number_of_restarts(tmp_path):
    whole = CurvesSoFar(tmp_path / "whole.npz")
    for step, eer in ((0, 0.5), (10, 0.1), (20, 0.2)):
        expected = whole.with_newest(step, report(eer))
    for step, eer in ((0, 0.5), (10, 0.1), (20, 0.2), (10, 0.1), (20, 0.2), (20, 0.2)):
        again = CurvesSoFar(tmp_path / "restarted.npz")
        found = again.with_newest(step, report(eer))
        again.write()
    assert list(found) == list(expected) == ["step 0", "step 10, the best", "step 20"]
    for name, curve in found.items():
        assert curve.eer == expected[name].eer and (curve.genuine_pairs, curve.impostor_pairs) == (PAIRS, 2 * PAIRS)
        np.testing.assert_array_equal(curve.roc, expected[name].roc)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 damaged", b"x" * 100], ids=["none", "empty", "damaged", "other"])
def test_a_file_that_cannot_be_read_is_forgotten(tmp_path, content):
    if content is not None:
        (tmp_path / "curves.npz").write_bytes(content)
    curves = CurvesSoFar(tmp_path / "curves.npz")
    assert list(curves.with_newest(5, report(0.1))) == ["step 5"]
    curves.write()
    assert list(CurvesSoFar(tmp_path / "curves.npz").with_newest(6, report(0.2))) == ["step 5, the best", "step 6"]


def test_histograms_thresholds_and_groups_of_the_newest_are_kept(tmp_path):
    curves = CurvesSoFar(tmp_path / "curves.npz", {"a": 1})
    for step, eer in ((5, 0.2), (6, 0.3)):
        curves.with_newest(step, report(eer, **{"a/b": report(0.4), "<c>": report(0.5)}))
    curves.write()
    of, found = read(tmp_path / "curves.npz")
    assert of == '{"a": 1}' and list(found) == [5, 6] and not found[5].groups
    assert (found[6].threshold_at_eer, found[6].step) == (0.15, 6)
    np.testing.assert_array_equal(found[6].histograms, [np.arange(256), np.arange(256) * 2])
    assert {name: (group.eer, group.threshold_at_eer) for name, group in found[6].groups.items()} == {"a/b": (0.4, 0.2), "<c>": (0.5, 0.25)}


def test_a_file_of_an_earlier_version(tmp_path):
    roc = np.zeros((2, 3))
    np.savez_compressed(tmp_path / "curves.npz", of=np.array("null"), **{"7/numbers": np.array([0.1, 10, 100]), "7/roc": roc})
    (curve,) = read(tmp_path / "curves.npz")[1].values()
    assert (curve.step, curve.eer, curve.threshold_at_eer, curve.histograms) == (7, 0.1, None, None)
    assert list(CurvesSoFar(tmp_path / "curves.npz").with_newest(9, report(0.2))) == ["step 7, the best", "step 9"]


DAMAGES = {
    "numbers": [
        [0.1, 0, 9, 0.3], [0.1, 9, np.nan, 0.3], [0.1, 1e300, 9, 0.3], [np.nan, 9, 9, 0.3], [7, 9, 9, 0.3], [0.1, 9, 9, np.nan], [0.1],
    ],
    "roc": [
        np.zeros((2, 0)), np.ones((2, 3)), np.full((2, 3), np.nan), [[0, 0.5, 1], [0, 2, 5.0]], [[0, 0.5, 0.1], [0, 0.5, 1]],
        np.zeros((3, 3)), np.zeros(3), [[0j, 1], [0, 1]], [["0", "1"], ["0", "1"]], [[0, 1], [0, 1]],
    ],
    "histograms": [np.zeros((2, 9), int), np.full((2, 256), -1), np.full((2, 256), 2**62), np.zeros((2, 256)), ["a"]],
}  # fmt: skip


@pytest.mark.parametrize(("part", "content"), [(part, content) for part, several in DAMAGES.items() for content in several])
def test_what_no_figure_could_draw_is_forgotten(tmp_path, part, content):
    curves = CurvesSoFar(tmp_path / "curves.npz")
    curves.with_newest(5, report(0.1))
    curves.write()
    with np.load(tmp_path / "curves.npz") as whole:
        arrays = dict(whole)
    assert len(read(tmp_path / "curves.npz")[1]) == 1
    np.savez_compressed(tmp_path / "curves.npz", **(arrays | {f"5/{part}": np.array(content)}))
    assert read(tmp_path / "curves.npz") == ("", {})


def test_a_file_that_unpacks_to_more_than_curves_have_is_forgotten(tmp_path):
    np.savez_compressed(tmp_path / "curves.npz", of=np.array("null"), **{"5/roc": np.zeros((2, MOST // 16 + 1))})
    assert read(tmp_path / "curves.npz") == ("", {})
