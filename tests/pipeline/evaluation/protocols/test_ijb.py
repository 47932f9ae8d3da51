"""IJB-B and IJB-C in InsightFace's packing, against a float64 computation from the files: warp, templates, 1:1, 1:N, bad files, ranks."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders import DataConfig
from pipeline.evaluation import evaluate, templates
from pipeline.evaluation.protocols import ijb as module
from pipeline.evaluation.report import Report
from pipeline.evaluation.template_lists import TemplateLists, read_lists

SIDE = 16
DATA = DataConfig(image_size=SIDE, threads=1)
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def write_ijb(folder: Path, target: str = "ijbc", subjects: int = 6, seed: int = 0) -> Path:
    """Of each subject one gallery template and two others, of a still and a video of two frames; ids leave gaps. Faces of a subject are
    one pattern with noise, turned and shifted in their crops."""
    rng = np.random.default_rng(seed)
    meta, crops = folder / "meta", folder / "loose_crop"
    meta.mkdir(parents=True)
    crops.mkdir()
    faces, points, of_template = [], [], {}
    for subject in range(subjects):
        pattern = cv2.resize(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC)
        for place in range(3):
            template = 10 + 7 * (3 * subject + place)
            of_template[template] = subject
            for media in (100 + template, 900, 900):  # a still, and two frames of a video whose number comes again in other templates
                name = f"{len(faces) + 1}.png"
                angle, scale = rng.uniform(-0.5, 0.5), rng.uniform(0.5, 1.5)
                matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) * scale
                shift = rng.uniform(10, 40, 2)
                noisy = np.clip(pattern + rng.normal(0, 60, pattern.shape), 0, 255).astype(np.uint8)
                cv2.imwrite(str(crops / name), cv2.warpAffine(noisy, np.column_stack([matrix, shift]), (160, 150)))
                five = (TEMPLATE @ matrix.T + shift).round(3)
                faces.append(f"{name} {template} {media}")
                points.append(f"{name} {' '.join(map(str, five.ravel()))} {rng.uniform(0.3, 1):.4f}")
    ids = list(of_template)
    pairs = [f"{a} {b} {int(of_template[a] == of_template[b])}" for at, a in enumerate(ids) for b in ids[at + 1 :]]
    (meta / f"{target}_face_tid_mid.txt").write_text("\n".join(faces) + "\n")
    (meta / f"{target}_name_5pts_score.txt").write_text("\n".join(points) + "\n")
    (meta / f"{target}_template_pair_label.txt").write_text("\n".join(pairs) + "\n")
    rows = {part: ["TEMPLATE_ID,SUBJECT_ID,FILENAME"] for part in ("gallery_1", "gallery_2", "probe_mixed")}
    for at, template in enumerate(ids):
        subject = of_template[template]
        part = "probe_mixed" if at % 3 else f"gallery_{1 + subject % 2}"
        rows[part] += [f"{template},{500 + subject},img/{n}.jpg" for n in range(3)]  # a row for each image, as the real files have
    first = "G" if target == "ijbc" else "S"
    for part, lines in rows.items():
        (meta / f"{target}_1N_{part.replace('gallery_', 'gallery_' + first)}.csv").write_text("\n".join(lines) + "\n")
    return folder


def features_of(folder: Path, target: str) -> np.ndarray:
    """Of each line: the warped image, RGB between -1 and 1, and its mirror image."""
    found = []
    for line in (folder / "meta" / f"{target}_name_5pts_score.txt").read_text().splitlines():
        name, *numbers = line.split()
        five, want = np.array(numbers[:10], float).reshape(5, 2), TEMPLATE * (SIDE / 112)
        system = np.concatenate([[[x, -y, 1, 0], [y, x, 0, 1]] for x, y in five])  # of a, b, and the shift
        a, b, x, y = np.linalg.lstsq(system, want.ravel(), rcond=None)[0]
        image = cv2.imread(str(folder / "loose_crop" / name))
        face = cv2.warpAffine(image, np.array([[a, -b, x], [b, a, y]]), (SIDE, SIDE), borderValue=0)[:, :, ::-1]
        both = [part.transpose(2, 0, 1).astype(float).ravel() / 127.5 - 1 for part in (face, face[:, ::-1])]
        found.append(both[0] + both[1])
    return np.array(found)


def exact_templates(features: np.ndarray, scores: np.ndarray, template: np.ndarray, media: np.ndarray) -> dict[int, np.ndarray]:
    found = {}
    for one in np.unique(template):
        parts = [
            (features * scores[:, None])[(template == one) & (media == video)].mean(axis=0) for video in np.unique(media[template == one])
        ]
        found[int(one)] = np.sum(parts, axis=0) / np.linalg.norm(np.sum(parts, axis=0))
    return found


def exact_tar(score: np.ndarray, same: np.ndarray, rate: float) -> tuple[float, float]:
    """At the corner of the curve nearest to `rate`, of several the one that accepts most; and at most at that rate. scikit-learn's
    roc_curve, which the script calls, drops a point that lies as far from the one before as from the next, in both directions."""
    thresholds = np.unique(score)[::-1]
    false, true = ([int((score[kind] >= at).sum()) for at in thresholds] for kind in (~same, same))
    steps = [(false[at] - false[at - 1], true[at] - true[at - 1]) for at in range(1, len(false))]
    kept = [at for at in range(len(false)) if at in (0, len(false) - 1) or steps[at - 1] != steps[at]]
    corners = [(0.0, 0.0), *((false[at] / (~same).sum(), true[at] / same.sum()) for at in kept)]
    closest = min(abs(far - rate) for far, _ in corners)
    nearest = max(tar for far, tar in corners if abs(far - rate) <= closest + 1e-15)
    return nearest, max(tar for far, tar in zip([0, *false], [0, *true], strict=True) if far <= rate * (~same).sum() + 1e-9) / same.sum()


def exact_one_to_many(probes: list, gallery: list, mate: list[int]) -> dict:
    """As InsightFace's ijb_1n.py has it, with ties against the mate."""
    similarity = np.round(np.array(probes) @ np.array(gallery).T, 6)
    own = similarity[np.arange(len(mate)), mate]
    similarity[np.arange(len(mate)), mate] = -2
    others = np.sort(similarity[similarity > -2])[::-1]
    found = {f"rank{k}": np.mean([(row >= score).sum() < k for row, score in zip(similarity, own, strict=True)]) for k in (1, 5, 10)}
    thresholds = {fpir: others[math.ceil(len(mate) * fpir) - 1] for fpir in (0.1, 0.01)}
    return found | {f"tpir_at_fpir/{fpir:g}": (own > threshold).mean() for fpir, threshold in thresholds.items()}


@pytest.mark.parametrize("target", ["ijbb", "ijbc"])
def test_equals_a_computation_from_the_files(tmp_path, target):
    folder = write_ijb(tmp_path / target, target)
    report = evaluate(flat, str(folder), DATA, protocol="ijb")
    meta = folder / "meta"
    faces = np.array([line.split()[1:] for line in (meta / f"{target}_face_tid_mid.txt").read_text().splitlines()], int)
    scores = np.array([line.split()[-1] for line in (meta / f"{target}_name_5pts_score.txt").read_text().splitlines()], float)
    vector = exact_templates(features_of(folder, target), scores, *faces.T)
    pairs = np.loadtxt(meta / f"{target}_template_pair_label.txt", int)
    score, same = np.array([vector[a] @ vector[b] for a, b, _ in pairs]).round(6), pairs[:, 2] == 1
    nearest, conservative = exact_tar(score, same, 0.1)
    assert report.tar_at_far["1e-1"] == pytest.approx(nearest, abs=1e-12)
    assert report.tar_at_far_conservative["1e-1"] == pytest.approx(conservative, abs=1e-12)
    assert (report.genuine_pairs, report.impostor_pairs) == (same.sum(), (~same).sum())
    assert (report.templates, report.images, report.unreadable, report.left_out) == (18, 54, 0, 0)
    ids = sorted(vector)
    gallery, probes = ids[::3], [one for one in ids if one not in ids[::3]]
    want = exact_one_to_many([vector[one] for one in probes], [vector[one] for one in gallery], [ids.index(one) // 3 for one in probes])
    search = report.groups["1:N"]
    assert {name: search.figures[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert (search.queries, search.gallery, search.left_out) == (12, 6, 0)


def lists_of(template: list[int], media: list[int], pairs: list[tuple[int, int, int]], **others: object) -> TemplateLists:
    first, second, label = (np.array(part, np.int32) for part in zip(*pairs, strict=True))
    count = len(template)
    ids = np.array(template, np.int64), np.array(media, np.int64)
    scores = np.random.default_rng(0).uniform(0.2, 1, count)
    of_subjects = {"gallery": None, "probes": None} | others
    return TemplateLists([str(n) for n in range(count)], *ids, np.zeros((count, 5, 2)), scores, first, second, label == 1, **of_subjects)


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_templates_and_pairs_equal_a_loop_over_both(data):
    """Ids of any size, media numbers that several templates use, pairs in both orders and more than once, several blocks of templates."""
    count = data.draw(st.integers(2, 40))
    template = np.array(data.draw(st.lists(st.sampled_from([-5, 0, 3, 8, 10**12]), min_size=count, max_size=count)))
    media = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    weight = np.array(data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=count, max_size=count)))
    features = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(count, 6))
    want = exact_templates(features, weight, template, media)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "_ROWS", 3)
        patch.setattr(templates, "TILE", 2)
        unit, ids = templates.pool(torch.from_numpy(features).float(), weight, template, media, "x")
        assert ids.tolist() == sorted(want)
        assert np.allclose(unit.numpy(), [want[one] for one in ids.tolist()], atol=1e-6)
        row = st.integers(0, len(ids) - 1)
        pairs = np.array(data.draw(st.lists(st.tuples(row, row, st.booleans()), min_size=1, max_size=30)))
        patch.setattr(templates, "spans", _spans_of_two)
        genuine, impostor = templates.count_pairs(unit, pairs[:, 0], pairs[:, 1], pairs[:, 2] == 1)
    score = np.array([want[int(ids[a])] @ want[int(ids[b])] for a, b, _ in pairs])
    for counts, kind in ((genuine, pairs[:, 2] == 1), (impostor, pairs[:, 2] == 0)):
        found = np.repeat(module.lower_edges() + 0.95e-6, counts)
        assert np.allclose(found, np.sort(score[kind]), atol=3e-6)


def _spans_of_two(number: int, size: int = 0) -> list[slice]:
    return [slice(at, min(at + (size or 2), number)) for at in range(0, number, size or 2)]


def random_set(subjects: int = 40, seed: int = 1) -> tuple[TemplateLists, torch.Tensor]:
    """Three templates of each subject: one of the gallery, two probes."""
    rng = np.random.default_rng(seed)
    template = np.repeat(np.arange(3 * subjects), 4)
    centres = rng.normal(size=(subjects, 8))[template // 3]
    features = torch.from_numpy(centres + 2.5 * rng.normal(size=centres.shape)).float()
    pairs = [(a, b, int(a // 3 == b // 3)) for a in range(3 * subjects) for b in range(a)]
    ids = np.arange(3 * subjects)
    gallery, probes = ids[::3], ids[ids % 3 > 0]
    subjects_of = {"gallery": (gallery, gallery // 3), "probes": (probes, probes // 3)}
    return lists_of(template.tolist(), (np.arange(len(template)) % 3).tolist(), pairs, **subjects_of), features


def test_scores_of_random_templates_equal_float64():
    lists, features = random_set()
    report = module.compare(lists, features)
    vector = exact_templates(features.numpy().astype(float), lists.score_N, lists.template_N, lists.media_N)
    score = np.array([vector[a] @ vector[b] for a, b in zip(lists.first_P.tolist(), lists.second_P.tolist(), strict=True)]).round(6)
    for name, rate in (("1e-1", 0.1), ("1e-2", 0.01), ("1e-3", 0.001)):
        nearest, conservative = exact_tar(score, lists.same_P, rate)
        assert report.tar_at_far[name] == pytest.approx(nearest, abs=1e-12)
        assert report.tar_at_far_conservative[name] == pytest.approx(conservative, abs=1e-12)
    assert report.tar_at_far["1e-4"] is None  # 7,020 impostor pairs
    gallery, probes = lists.gallery[0].tolist(), lists.probes[0].tolist()
    want = exact_one_to_many([vector[one] for one in probes], [vector[one] for one in gallery], [one // 3 for one in probes])
    assert {name: report.groups["1:N"].figures[name] for name in want} == pytest.approx(want, abs=1e-12)


def test_tied_scores_are_no_hit():
    """All templates are one vector: every impostor equals the mate, and no probe is above the threshold."""
    lists, features = random_set(subjects=5)
    search = module.compare(lists, torch.ones_like(features)).groups["1:N"]
    assert (search.rank1, search.rank5, search.tpir_at_fpir["0.1"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_no_bit(ranks, size):
    lists, features = random_set()
    want = module.compare(lists, features)
    for report in ranks(size).run(_of_a_rank, lists, features):
        assert report.as_dict() == want.as_dict()


def _of_a_rank(lists: TemplateLists, features: torch.Tensor) -> Report:
    templates.TILE = 32  # more tiles than ranks; of the ranks alone
    try:
        return module.compare(lists, features, rank=dist.get_rank(), world_size=dist.get_world_size())
    finally:
        templates.TILE = 1024


def test_features_that_are_not_finite_end_in_a_sentence():
    lists, features = random_set(subjects=4)
    features[3, 2] = torch.nan
    with pytest.raises(ValueError, match="ijb: the embeddings of 1 of 48 images are not finite"):
        module.compare(lists, features, name="ijb")


def changed(folder: Path, name: str, change: object) -> None:
    path = folder / "meta" / name
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


FACES, POINTS, PAIRS = "ijbc_face_tid_mid.txt", "ijbc_name_5pts_score.txt", "ijbc_template_pair_label.txt"
G1, G2, PROBES = "ijbc_1N_gallery_G1.csv", "ijbc_1N_gallery_G2.csv", "ijbc_1N_probe_mixed.csv"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (FACES, lambda lines: [*lines, "x.png 3"], r"face_tid_mid.txt, line 55 is 'x.png 3'; expected NAME TEMPLATE MEDIA"),
        (FACES, lambda lines: [], "face_tid_mid.txt is empty; expected lines NAME TEMPLATE MEDIA"),
        (
            FACES,
            lambda lines: lines[3:],
            "has landmarks of 3 images that the list of faces does not name, such as 1.png; copy both lists again.*--allow-missing",
        ),
        (FACES, lambda lines: [*lines, "77.png 3 4"], r"no landmarks of 1 of 55 images \(77.png\)"),
        (FACES, lambda lines: lines[:-1], r"5pts_score.txt has landmarks of 1 images that the list of faces does not name, such as 54.png"),
        (FACES, lambda lines: [*lines, f"1.png {10**20} 4"], "face_tid_mid.txt has the number 1000.*, which is too large"),
        (POINTS, lambda lines: [line.rsplit(" ", 1)[0] for line in lines], "5pts_score.txt, line 1 is '1.png .*; expected NAME x1 y1"),
        (POINTS, lambda lines: [lines[0], lines[1].replace(".", "x", 2)], "5pts_score.txt, line 2 is .*; expected NAME x1 y1"),
        (POINTS, lambda lines: [lines[0].rsplit(" ", 1)[0] + " nan"], "5pts_score.txt, line 1 is"),
        (POINTS, lambda lines: lines[:4], r"no landmarks of 50 of 54 images \(5.png, 6.png, 7.png, ...\).*--allow-missing"),
        (POINTS, lambda lines: [lines[0], *lines], "several lines for one image"),
        (PAIRS, lambda lines: [*lines[:4], "10 x 1"], "pair_label.txt, line 5 is '10 x 1'; expected TEMPLATE TEMPLATE LABEL"),
        (PAIRS, lambda lines: [*lines[:4], "10 17"], "pair_label.txt, line 5 is '10 17'"),
        (PAIRS, lambda lines: [line[:-2] for line in lines], "pair_label.txt, line 1 is '10 17'"),
        (PAIRS, lambda lines: [*lines[:4], "10 17 2"], "pair_label.txt, line 5 is '10 17 2'"),
        (PAIRS, lambda lines: [*lines[:4], "10 99999999999 1"], "pair_label.txt cannot be read"),
        (PAIRS, lambda lines: [*lines[:4], "10 17.5 1"], "pair_label.txt, line 5 is "),
        (PAIRS, lambda lines: [], "pair_label.txt is empty"),
        (PAIRS, lambda lines: [*lines, "10 4321 0"], "pair_label.txt names 1 templates that no line of .* such as 4321"),
        (G1, lambda lines: lines[1:], "gallery_G1.csv begins with numbers"),
        (G1, lambda lines: [*lines, "10,999,x"], "gallery_G1.csv, line 11 gives template 10 the subject 999, an earlier line 500"),
        (G1, lambda lines: [*lines, "17,500,x"], "have 2 templates of subject 500; expected one of each"),
        (G1, lambda lines: [*lines, "5,x"], "gallery_G1.csv, line 11 is '5,x'"),
        (PROBES, lambda lines: [*lines, "4321,777,x"], "probe_mixed.csv has 1 subjects that are in no gallery, such as 777"),
        (PROBES, lambda lines: lines[:1], "probe_mixed.csv names no template"),
        (PROBES, lambda lines: [*lines, "10,501,x"], "probe_mixed.csv give template 10 two subjects, 500 and 501; copy them again"),
        (G2, lambda lines: [*lines, "10,999,x"], "G1.csv, .*G2.csv, .* give template 10 two subjects, 500 and 999; copy them again"),
    ],
)
def test_lists_that_do_not_fit_end_in_a_sentence(tmp_path, name, change, sentence):
    folder = write_ijb(tmp_path / "IJBC")
    changed(folder, name, change)
    with pytest.raises(ValueError, match=sentence):
        module.Ijb(str(folder), DATA)


def test_a_folder_of_another_kind_and_half_of_the_lists_for_search_end_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"meta has none of ijbb_face_tid_mid.txt and ijbc_face_tid_mid.txt"):
        module.Ijb(str(tmp_path), DATA)
    folder = write_ijb(tmp_path / "IJBC")
    (folder / "loose_crop").rename(tmp_path / "crops")
    with pytest.raises(ValueError, match=r"IJBC/loose_crop is no folder; expected the images of .*meta there"):
        module.Ijb(str(folder), DATA)
    assert len(module.Ijb(str(folder), DATA, images=str(tmp_path / "crops")).source) == 54
    (tmp_path / "crops").rename(folder / "loose_crop")
    (folder / "meta" / G1).unlink()
    with pytest.raises(
        ValueError, match=r"gallery_G1.csv is missing: 1:N needs ijbc_1N_gallery_G1.csv, ijbc_1N_gallery_G2.csv, ijbc_1N_pr"
    ):
        module.Ijb(str(folder), DATA)
    for path in (folder / "meta").glob("*1N*"):
        path.unlink()
    assert module.Ijb(str(folder), DATA).lists.gallery is None


def test_names_are_matched_where_lists_stand_in_another_order(tmp_path):
    folder = write_ijb(tmp_path / "IJBC")
    before = read_lists(str(folder))
    changed(folder, POINTS, lambda lines: lines[::-1])
    after = read_lists(str(folder))
    assert np.array_equal(before.points_N52, after.points_N52) and np.array_equal(before.score_N, after.score_N)


def test_a_template_in_both_galleries_counts_once_and_labels_that_contradict_subjects_are_told(tmp_path, caplog):
    folder = write_ijb(tmp_path / "IJBC")
    want = evaluate(flat, str(folder), DATA, protocol="ijb").groups["1:N"].as_dict()
    changed(folder, G2, lambda lines: [*lines, "10,500,x"])
    changed(folder, PAIRS, lambda lines: [lines[0][:-1] + "0", *lines[1:], "10 31 1"])
    assert "label" not in caplog.text
    report = evaluate(flat, str(folder), DATA, protocol="ijb")
    assert report.groups["1:N"].as_dict() == want
    assert "the label of 2 pairs is not what the subjects of the lists for 1:N say" in caplog.text


def test_missing_images_are_refused_or_left_out_and_counted(tmp_path, caplog):
    """All of template 10, which is one of the gallery, and one frame of another; a file that is no image counts as unreadable."""
    folder = write_ijb(tmp_path / "IJBC")
    for name in ("1.png", "2.png", "3.png", "6.png"):
        (folder / "loose_crop" / name).unlink()
    with pytest.raises(ValueError, match=r"lacks 4 of the 54 images of .*meta \(1.png, 2.png, 3.png, ...\).*--allow-missing"):
        module.Ijb(str(folder), DATA)
    (folder / "loose_crop" / "7.png").write_bytes(b"no image")
    report = evaluate(flat, str(folder), DATA, protocol="ijb", options={"allow_missing": True})
    assert (report.images, report.unreadable, report.templates) == (49, 1, 17)
    assert (report.left_out, report.templates_left_out) == (17, 1)
    search = report.groups["1:N"]
    assert (search.gallery, search.queries, search.left_out) == (5, 10, 2)
    assert "17 pairs and 1 templates are left out" in caplog.text


def test_a_crop_whose_landmarks_are_one_point_is_left_out(tmp_path):
    folder = write_ijb(tmp_path / "IJBC")
    changed(folder, POINTS, lambda lines: [f"1.png {'5 ' * 10}0.5", *lines[1:]])
    assert evaluate(flat, str(folder), DATA, protocol="ijb").unreadable == 1


def test_allow_missing_leaves_out_what_names_unknown_templates(tmp_path):
    folder = write_ijb(tmp_path / "IJBC")
    changed(folder, PAIRS, lambda lines: [*lines, "10 4321 0", "4321 5432 1"])
    changed(folder, PROBES, lambda lines: [*lines, "777,501,x"])
    changed(folder, POINTS, lambda lines: [*lines[1:], lines[0].replace("1.png", "other.png")])
    report = evaluate(flat, str(folder), DATA, protocol="ijb", options={"allow_missing": True})
    assert (report.images, report.left_out, report.templates_left_out) == (53, 2, 2)
    assert (report.groups["1:N"].queries, report.groups["1:N"].left_out) == (12, 1)


def test_ranks_embed_and_compare_the_folder_alike(ranks, tmp_path):
    folder = write_ijb(tmp_path / "IJBC")
    want = evaluate(flat, str(folder), DATA, protocol="ijb").as_dict()
    assert ranks(2).run(_evaluate_on_a_rank, str(folder)) == [want, want]


def _evaluate_on_a_rank(folder: str) -> dict:
    return evaluate(flat, folder, DATA, protocol="ijb", rank=dist.get_rank(), world_size=dist.get_world_size()).as_dict()
