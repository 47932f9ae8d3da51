"""Reports on a terminal: intervals, what is unreached, groups side by side."""

import numpy as np

from pipeline.evaluation.report import Report
from pipeline.evaluation.report_lines import lines


def report(figures, thresholds=None, **more):
    return Report(figures, thresholds or {}, "threshold", (np.zeros(1), np.zeros(1)), np.zeros(256, int), np.zeros(256, int), **more)


def test_figures_intervals_and_what_is_missing():
    figures = {"eer": 0.25, "tar_at_far/1e-3": 0.5, "tar_at_far/1e-6": None, "mfr": None, "rank1": None, "images": 7}
    thresholds = {"threshold_at_far/1e-3": None, "threshold_at_far/1e-6": None}
    assert list(lines(report(figures, thresholds, intervals={"eer": (0.2, 0.31)}))) == [
        "eer                         0.2500  (0.2000 to 0.3100)",
        "tar_at_far=1e-3             0.5000",
        "tar_at_far=1e-6             unreached: too few impostor pairs",
        "mfr                         unreached: too few impostor pairs",
        "images                      7",
        "threshold_at_far=1e-3       accepts nothing",
        "threshold_at_far=1e-6       unreached: too few impostor pairs",
    ]


def test_groups_stand_side_by_side_as_many_as_there_is_room_for():
    """Names of any length stay apart from their values."""
    long = "threshold_at_far_conservative/1e-6"
    groups = {f"group {at}": report({"eer": at / 10, "images": at} | ({} if at else {"rank20": 1.0, long: None})) for at in range(7)}
    found = list(lines(report({"eer": 0.0}, groups=groups)))
    assert found[0] == "eer                         0.0000"
    heads = [line.split("group")[1:] for line in found if "group" in line]
    assert [len(head) for head in heads] == [4, 3] and max(map(len, found)) <= 120
    assert found[1].startswith("\n") and found[2].split() == ["eer", "0.0000", "0.1000", "0.2000", "0.3000"]
    rank, threshold = (next(line for line in found if line.startswith(name)) for name in ("rank20", "threshold"))
    assert rank.split() == ["rank20", "1.0000", "-", "-", "-"]
    assert threshold.split() == ["threshold_at_far_conservative=1e-6", "unreached", "-", "-", "-"]
