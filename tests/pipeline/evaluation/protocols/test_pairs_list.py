"""Lists of pairs in the forms of LFW, CALFW and CPLFW, over folders of images, against a loop over folds."""

import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.evaluation import evaluate
from pipeline.evaluation.listed_pairs import ListedPairs
from pipeline.evaluation.pair_lists import PairList, find, read_list
from pipeline.evaluation.protocols.pairs_list import person_of
from tests.pipeline.people import DATA, distance, feature, flat, loop_over_folds, write_images

EACH = 3  # pairs of each kind in a fold


def lfw(folder, folds=10, header=True):
    """pairs.txt beside lfw/, in the form of LFW: folds of genuine pairs, then impostor pairs, of people that other folds do not have."""
    lines, files = [f"{folds}\t{EACH}"] * header, set()
    for fold in range(folds):
        people = [f"Ann_{fold}_{at}" for at in range(EACH)]
        lines += [f"{name}\t1\t2" for name in people]
        lines += [f"{name}\t1\t{other}\t{1 + at % 2}" for at, (name, other) in enumerate(zip(people, people[1:] + people[:1], strict=True))]
        files |= {f"{name}/{name}_000{number}.jpg" for name in people for number in (1, 2)}
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    write_images(folder / "lfw", sorted(files), lambda name: name.split("/")[0])
    return str(folder / "pairs.txt")


def want(folder, listed: PairList, folds=10):
    """Distances, which are genuine, and accuracies of the folds."""
    files = find(listed, "list", str(folder))
    distances = np.array([distance(*(feature(files[name]) for name in pair)) for pair in listed.pairs])
    same = np.array(listed.issame)
    return distances, same, loop_over_folds(distances, same, np.arange(len(same)) * folds // len(same))


@pytest.mark.parametrize("header", [True, False])
def test_lfw_in_its_ten_folds(tmp_path, header):
    path = lfw(tmp_path, header=header)
    report = evaluate(flat, path, DATA, protocol="pairs_list", options={"images": str(tmp_path / "lfw")}, flip=False)
    distances, same, accuracies = want(tmp_path / "lfw", read_list(path))
    assert 0.6 < np.mean(accuracies) < 1
    assert (report.accuracy, report.std) == pytest.approx((np.mean(accuracies), np.std(accuracies)), abs=1e-12)
    assert [row["accuracy"] for row in report.tables["thresholds"]] == pytest.approx(accuracies, abs=1e-12)
    assert report.tar_at_far["1e-1"] == (distances[same] <= np.sort(distances[~same])[len(same) // 20 - 1]).mean()
    assert (report.pairs, report.folds, report.images, report.identities, report.left_out, report.unreadable) == (60, 10, 60, 30, 0, 0)
    assert {"accuracy", "eer", "tar_at_far/1e-1"} <= report.intervals.keys()


def test_folds_are_those_of_the_list(tmp_path):
    path = lfw(tmp_path, folds=4)
    report = evaluate(flat, path, DATA, protocol="pairs_list", options={"images": str(tmp_path / "lfw")})
    assert report.folds == 4
    assert report.accuracy == pytest.approx(np.mean(want(tmp_path / "lfw", read_list(path), folds=4)[2]), abs=1e-12)


def test_lists_of_calfw_beside_their_images(tmp_path):
    """Two lines a pair; 0 is an impostor pair, other numbers are folds. Images lie beside the list."""
    lines = []
    for fold in range(1, 11):
        lines += [f"Bob_{fold}_0001.jpg {fold}", f"Bob_{fold}_0002.jpg {fold}"]
    for fold in range(1, 11):
        lines += [f"Bob_{fold}_0001.jpg 0", f"Bob_{fold % 10 + 1}_0002.jpg 0"]
    (tmp_path / "pairs_CALFW.txt").write_text("\n".join(lines))
    write_images(tmp_path, {line.split()[0] for line in lines}, lambda name: name[:-9])
    path = str(tmp_path / "pairs_CALFW.txt")
    report = evaluate(flat, path, DATA, protocol="pairs_list")
    assert (report.pairs, report.folds, report.identities, report.images) == (20, 10, 10, 20)
    assert report.accuracy == pytest.approx(np.mean(want(tmp_path, read_list(path))[2]), abs=1e-12)


def test_missing_images_are_listed_and_refused_or_left_out(tmp_path, caplog):
    path, images = lfw(tmp_path), {"images": str(tmp_path / "lfw")}
    for name in ("Ann_3_1", "Ann_7_0"):
        (tmp_path / "lfw" / name / f"{name}_0002.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"lacks 2 of the 60 images of .*pairs.txt \(Ann_3_1_0002, Ann_7_0_0002\).* --allow-missing leaves"
    ):
        evaluate(flat, path, DATA, protocol="pairs_list", options=images)
    report = evaluate(flat, path, DATA, protocol="pairs_list", options=images | {"allow_missing": True})
    listed = read_list(path)
    gone = sum(bool({"Ann_3_1_0002", "Ann_7_0_0002"} & set(pair)) for pair in listed.pairs)
    assert (report.left_out, report.pairs, report.folds) == (gone, 60 - gone, 10)
    kept = [at for at, pair in enumerate(listed.pairs) if not {"Ann_3_1_0002", "Ann_7_0_0002"} & set(pair)]
    distances = [distance(*(feature(tmp_path / "lfw" / name[:-5] / f"{name}.jpg") for name in listed.pairs[at])) for at in kept]
    accuracies = loop_over_folds(np.array(distances), np.array(listed.issame)[kept], np.array(kept) // 6)
    assert report.accuracy == pytest.approx(np.mean(accuracies), abs=1e-12)  # the folds are those of the whole list


def test_what_is_refused_before_anything_is_embedded(tmp_path):
    path = lfw(tmp_path)

    def never(images):
        raise AssertionError("embedded")

    with pytest.raises(ValueError, match=r"lacks 60 of the 60 images(?!.*--allow-missing).* Name the folder where they are with --images"):
        evaluate(never, path, DATA, protocol="pairs_list", options={"allow_missing": True, "images": str(tmp_path / "none")})
    (tmp_path / "one.txt").write_text("Ann_0_0\t1\t2\n" * 4)
    with pytest.raises(ValueError, match=r"one.txt: no impostor pair is among its 4 pairs with both images"):
        evaluate(never, str(tmp_path / "one.txt"), DATA, protocol="pairs_list", options={"images": str(tmp_path / "lfw")})
    (tmp_path / "out.txt").write_text("../secret\t1\t2\nAnn_0_0\t1\tAnn_0_1\t2\n")
    with pytest.raises(ValueError, match="lies outside"):
        evaluate(never, str(tmp_path / "out.txt"), DATA, protocol="pairs_list")
    with pytest.raises(ValueError, match="cannot be read as a list of pairs"):
        evaluate(never, str(tmp_path / "none.txt"), DATA, protocol="pairs_list")


def test_a_list_that_contradicts_itself_is_refused(tmp_path):
    write_images(tmp_path, ["A_1.jpg", "A_2.jpg"], lambda name: name[0])
    (tmp_path / "list.txt").write_text("A_1.jpg 1\nA_2.jpg 1\nA_2.jpg 0\nA_1.jpg 0\n")
    with pytest.raises(ValueError, match=r"list.txt names A_2.jpg and A_1.jpg as one person and as two; copy the list again"):
        evaluate(flat, str(tmp_path / "list.txt"), DATA, protocol="pairs_list")


def test_names_that_are_numbers_and_extensions_in_capitals(tmp_path):
    """A first line of three numbers is a pair."""
    write_images(tmp_path, [f"{name}/{name}_000{number}.JPG" for name in (17, 18) for number in (1, 2)], lambda name: name[:2])
    (tmp_path / "pairs.txt").write_text("17\t1\t2\n17\t1\t18\t2\n18\t1\t2\n")
    report = evaluate(flat, str(tmp_path / "pairs.txt"), DATA, protocol="pairs_list")
    assert (report.pairs, report.images, report.identities, report.genuine_pairs) == (3, 4, 2, 2)


def test_unreadable_images_and_embeddings_that_are_not_finite(tmp_path, caplog):
    path, options = lfw(tmp_path), {"images": str(tmp_path / "lfw")}
    with pytest.raises(ValueError, match=r"pairs.txt: 60 of 60 embeddings are not finite"):
        evaluate(lambda images: flat(images) * torch.nan, path, DATA, protocol="pairs_list", options=options)
    (tmp_path / "lfw" / "Ann_0_0" / "Ann_0_0_0001.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        report = evaluate(flat, path, DATA, protocol="pairs_list", options=options)
    assert (report.unreadable, report.left_out, report.pairs) == (1, 0, 57)
    assert "Ann_0_0_0001.jpg" in caplog.text


def test_a_list_that_contradicts_the_names_does_not_say_who_is_who():
    listed = PairList([("A_1", "A_2"), ("A_1", "B_1"), ("A_2", "B_1")], [True, False, True], 1)
    number = {"A_1": 0, "A_2": 1, "B_1": 2}
    assert ListedPairs.of(listed, "list", number, person_of).person_P2 is None
    right = PairList(listed.pairs, [True, False, False], 1)
    assert ListedPairs.of(right, "list", number, person_of).person_P2 is not None


def on_a_rank(path: str, images: str) -> tuple:
    torch.manual_seed(0)
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    report = evaluate(flat, path, DATA, protocol="pairs_list", options={"images": images}, batch_size=7, **ranks)
    return report.numbers(), report.intervals


def test_any_number_of_ranks_gives_the_same(tmp_path, ranks):
    path = lfw(tmp_path)
    one = evaluate(flat, path, DATA, protocol="pairs_list", options={"images": str(tmp_path / "lfw")}, batch_size=7)
    for size in (2, 4):
        assert all(found == (one.numbers(), one.intervals) for found in ranks(size).run(on_a_rank, path, str(tmp_path / "lfw")))
