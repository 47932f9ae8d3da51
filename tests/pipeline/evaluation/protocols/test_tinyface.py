"""TinyFace's Testing_Set, and mean average precision, against a loop over sorted float64 scores."""

from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders import DataConfig
from pipeline.evaluation import average_precision as ap_module
from pipeline.evaluation import evaluate
from pipeline.evaluation.average_precision import mean_average_precision
from pipeline.evaluation.protocols import tinyface as module
from pipeline.evaluation.report import Report

SIDE = 16
DATA = DataConfig(image_size=SIDE, threads=1)


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def exact(queries: np.ndarray, gallery: np.ndarray, of_queries: np.ndarray, of_gallery: np.ndarray) -> tuple[float, dict[str, float]]:
    """Mean average precision, walked along the sorted gallery with impostors first among equals; and rank-k of the best mate."""
    norms = [np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in (queries, gallery)]
    score = np.round((queries / norms[0]) @ (gallery / norms[1]).T, 6)
    found, places = [], []
    for row, label in zip(score, of_queries, strict=True):
        good = (of_gallery == label) & (of_gallery >= 0)
        if not good.any():
            continue
        order = np.lexsort((good, -row))
        precision, hits, total = 1.0, 0, 0.0
        for place, which in enumerate(order, start=1):
            before = precision
            hits += good[which]
            precision = hits / place
            if good[which]:
                total += (before + precision) / 2 / good.sum()
        found.append(total)
        places.append(np.flatnonzero(good[order])[0])
    return float(np.mean(found)), {f"rank{k}": float(np.mean(np.array(places) < k)) for k in (1, 5, 10, 20)}


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_mean_average_precision_equals_a_walk_along_the_gallery(data):
    """Directions on a circle in steps of 7.5 degrees, distractors, queries without a mate."""
    images = st.lists(st.tuples(st.integers(0, 47), st.integers(-1, 3)), min_size=1, max_size=40)
    queries, gallery = (np.array(data.draw(images)) for _ in range(2))
    rows = [np.column_stack([np.cos(part[:, 0] * np.pi / 24), np.sin(part[:, 0] * np.pi / 24)]) for part in (queries, gallery)]
    of = [torch.from_numpy(part).float() for part in rows]
    with mock.patch.object(ap_module, "TILE", 5), mock.patch.object(ap_module, "spans", _spans_of_five):
        found = mean_average_precision(*of, queries[:, 1], gallery[:, 1])
    if not np.isin(queries[:, 1], gallery[gallery[:, 1] >= 0, 1]).any():
        assert found is None
        return
    assert found == pytest.approx(exact(*rows, queries[:, 1], gallery[:, 1])[0], abs=1e-12)


def _spans_of_five(number: int, size: int) -> list[slice]:
    return [slice(at, min(at + 5, number)) for at in range(0, number, 5)]


def test_mean_average_precision_by_hand():
    """A mate at place 1 and one at place 3 of 4: (1 + 1) / 2 and (1 / 2 + 2 / 3) / 2, and of these the mean."""
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    found = mean_average_precision(torch.tensor([[1.0, 0.0]]), gallery, np.array([7]), np.array([7, -1, 7, 3]))
    assert found == pytest.approx((1 + 7 / 12) / 2, abs=1e-12)


def drawn() -> tuple[torch.Tensor, np.ndarray, int]:
    rng = np.random.default_rng(0)
    label = np.concatenate([rng.integers(0, 60, 300), np.arange(60), rng.integers(0, 60, 400), np.full(2100, -1)])
    rows = rng.normal(size=(61, 12))[label] * (label >= 0)[:, None] + rng.normal(size=(len(label), 12))
    return torch.from_numpy(rows).float(), label, 300


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_no_bit_and_equal_float64(ranks, size):
    rows, label, probes = drawn()
    want = module.compare(rows, label, probes)
    for report in ranks(size).run(_of_a_rank, rows, label, probes):
        assert report.as_dict() == want.as_dict()
    of = rows.double().numpy()
    precision, places = exact(of[:probes], of[probes:], label[:probes], label[probes:])
    assert want.figures["map"] == pytest.approx(precision, abs=1e-5)  # a few lie within the rounding of each other
    assert {name: want.figures[name] for name in places} == pytest.approx(places, abs=1e-12)


def _of_a_rank(*of: object) -> Report:
    return module.compare(*of, rank=dist.get_rank(), world_size=dist.get_world_size())


def write_tinyface(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    patterns = [cv2.resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), (SIDE, SIDE)) for _ in range(4)]
    for part, names in (
        ("Probe", ["3_1.jpg", "3_2.jpg", "12_4.jpg"]),
        ("Gallery_Match", ["3_7.jpg", "12_8.jpg", "12_9.jpg", "40_1.jpg"]),
        ("Gallery_Distractor", ["1.jpg", "2.jpg", "3.jpg"]),
    ):
        (folder / "Testing_Set" / part).mkdir(parents=True)
        for name in names:
            person = name.split("_")[0]
            pattern = patterns[{"3": 0, "12": 1, "40": 2}[person] if part != "Gallery_Distractor" else 3]
            noisy = np.clip(pattern + rng.normal(0, 30, pattern.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / "Testing_Set" / part / name), noisy)
    (folder / "Testing_Set" / "probe_img_ID_pairs.mat").write_bytes(b"MATLAB")
    return folder


def test_the_folder_of_the_set(tmp_path):
    folder = write_tinyface(tmp_path / "tinyface")
    report = evaluate(flat, str(folder), DATA, protocol="tinyface")
    assert (report.rank1, report.figures["map"], report.genuine_pairs, report.impostor_pairs) == (1.0, 1.0, 4, 17)
    assert (report.queries, report.gallery, report.distractors, report.unreadable) == (3, 7, 3, 0)
    assert evaluate(flat, str(folder / "Testing_Set"), DATA, protocol="tinyface").as_dict() == report.as_dict()
    (folder / "Testing_Set" / "Gallery_Match" / "more").mkdir()
    (remark,) = module.TinyFace(str(folder), DATA).source.account.remarks("tinyface")[1:]
    assert remark == "  1 beside the images: Gallery_Match/more"
    (folder / "Testing_Set" / "Gallery_Distractor" / "2.jpg").write_bytes(b"no image")
    report = evaluate(flat, str(folder), DATA, protocol="tinyface")
    assert (report.distractors, report.unreadable) == (2, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: [path.unlink() for path in (root / "Gallery_Distractor").iterdir()], "Gallery_Distractor has no images"),
        (
            lambda root: (root / "Probe").rename(root / "Probes"),
            r"Probe cannot be listed \(No such file or directory\); expected TinyFace's",
        ),
        (lambda root: (root / "Probe" / "3_1.jpg").rename(root / "Probe" / "x_1.jpg"), r"Probe/x_1.jpg: expected names such as 12_3.jpg"),
        (lambda root: (root / "Gallery_Match" / "3_7.jpg").unlink(), "has 1 identities without an image in Gallery_Match, such as 3"),
    ],
)
def test_folders_that_do_not_fit_end_in_a_sentence(tmp_path, change, sentence):
    folder = write_tinyface(tmp_path / "tinyface")
    change(folder / "Testing_Set")
    with pytest.raises(ValueError, match=sentence):
        module.TinyFace(str(folder), DATA)


def test_embeddings_that_are_not_finite_end_in_a_sentence():
    rows, label, probes = drawn()
    rows[probes + 5] = torch.nan
    with pytest.raises(ValueError, match="the gallery of set: the embeddings of 1 of 2560 images are not finite"):
        module.compare(rows, label, probes, name="set")
