"""RFW in its layout: the folds of four groups, their spread, and one threshold for all."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.evaluation import evaluate
from pipeline.evaluation.protocols.rfw import GROUPS
from tests.pipeline.people import DATA, distance, feature, flat, loop_over_folds, write_images

EACH = 2  # pairs of each kind in a fold


@pytest.fixture
def rfw(tmp_path):
    """test/txts/RACE/RACE_pairs.txt without a first line, names as those of MS-Celeb-1M, and test/data/RACE; noise differs by group."""
    for place, group in enumerate(GROUPS):
        lines, names = [], set()
        for fold in range(10):
            people = [f"m.0{place}{fold}{at}x" for at in range(EACH)]
            lines += [f"{name}\t1\t2" for name in people]
            lines += [f"{people[at]}\t{1 + at % 2}\t{people[at - 1]}\t1" for at in range(EACH)]
            names |= {f"{name}/{name}_000{number}.jpg" for name in people for number in (1, 2)}
        (tmp_path / "test" / "txts" / group).mkdir(parents=True)
        (tmp_path / "test" / "txts" / group / f"{group}_pairs.txt").write_text("\n".join(lines) + "\n")
        write_images(tmp_path / "test" / "data" / group, sorted(names), lambda name: name.split("/")[0], noise=60 + 80 * place)
    return tmp_path


def scores(root, group):
    """Distances and kinds of a group's pairs, read line by line."""
    distances, same = [], []
    for line in (root / "test" / "txts" / group / f"{group}_pairs.txt").read_text().splitlines():
        fields = line.split("\t")
        first, second = (fields[0], fields[1]), (fields[0] if len(fields) == 3 else fields[2], fields[-1])
        files = [root / "test" / "data" / group / name / f"{name}_{int(number):04d}.jpg" for name, number in (first, second)]
        distances.append(distance(*map(feature, files)))
        same.append(len(fields) == 3)
    return np.array(distances), np.array(same)


def test_groups_their_spread_and_one_threshold(rfw):
    report = evaluate(flat, str(rfw), DATA, protocol="rfw")
    of_groups = {group: scores(rfw, group) for group in GROUPS}
    folds = np.arange(40) // (2 * EACH)
    accuracy = {group: np.mean(loop_over_folds(*of_groups[group], folds)) for group in GROUPS}
    assert list(report.groups) == list(GROUPS)
    assert {group: of_group.accuracy for group, of_group in report.groups.items()} == pytest.approx(accuracy, abs=1e-12)
    values = list(accuracy.values())
    assert len(set(values)) > 1
    assert report.accuracy == pytest.approx(np.mean(values), abs=1e-12)
    assert report.spread == pytest.approx(max(values) - min(values), abs=1e-12)
    assert report.spread_std == pytest.approx(np.sqrt(np.mean((np.array(values) - np.mean(values)) ** 2)), abs=1e-12)

    cosines = {group: 1 - distances / 2 for group, (distances, _) in of_groups.items()}
    all_cosines, all_same = np.concatenate(list(cosines.values())), np.concatenate([same for _, same in of_groups.values()])
    best = max(((all_cosines >= cosine) == all_same).mean() for cosine in all_cosines)
    assert ((all_cosines >= report.threshold - 1e-9) == all_same).mean() == report.accuracy_at_common == best
    assert report.best_cosine == report.threshold
    for row in report.tables["thresholds"]:
        group = row["group"]
        accepted, same = cosines[group] >= report.threshold - 1e-9, of_groups[group][1]
        want = accepted[~same].mean(), accepted[same].mean()
        assert (row["far_at_common"], row["tar_at_common"]) == want
        assert (report.groups[group].far_at_common, report.groups[group].tar_at_common) == want
    assert (report.pairs, report.images, report.identities, report.unreadable, report.left_out) == (160, 160, 80, 0, 0)
    assert report.genuine_pairs == sum(group.genuine_pairs for group in report.groups.values()) == 80


def test_intervals_of_the_spread(rfw):
    report = evaluate(flat, str(rfw), DATA, protocol="rfw", options={"resamples": 300})
    assert {"accuracy", "spread", "spread_std", "eer"} <= report.intervals.keys()
    assert "accuracy" in report.groups["Indian"].intervals
    low, high = report.intervals["accuracy"]
    assert low < report.accuracy < high and report.intervals["spread"][0] >= 0
    wide = report.groups["Indian"].intervals["accuracy"]
    assert high - low < wide[1] - wide[0]  # four times the people
    assert evaluate(flat, str(rfw), DATA, protocol="rfw", options={"resamples": 0}).intervals == {}


def test_missing_images_and_lists(rfw):
    (rfw / "test" / "data" / "Asian" / "m.0100x" / "m.0100x_0002.jpg").unlink()
    with pytest.raises(ValueError, match=r"Asian lacks 1 of the 40 images of .*Asian_pairs.txt \(m.0100x_0002\).*--allow-missing"):
        evaluate(flat, str(rfw), DATA, protocol="rfw")
    report = evaluate(flat, str(rfw / "test"), DATA, protocol="rfw", options={"allow_missing": True, "resamples": 0})
    assert report.left_out == report.groups["Asian"].left_out > 0 and report.groups["Indian"].left_out == 0
    (rfw / "test" / "txts" / "Indian" / "Indian_pairs.txt").unlink()
    with pytest.raises(ValueError, match=r"data has no folder txts; expected RFW's folder, with test/txts/RACE/RACE_pairs.txt"):
        evaluate(flat, str(rfw / "test" / "data"), DATA, protocol="rfw")
    with pytest.raises(ValueError, match=r"Indian_pairs.txt cannot be read as a list of pairs"):
        evaluate(flat, str(rfw), DATA, protocol="rfw", options={"allow_missing": True})


def test_unreadable_images_and_embeddings_that_are_not_finite(rfw):
    (rfw / "test" / "data" / "Asian" / "m.0100x" / "m.0100x_0002.jpg").write_bytes(b"no image")
    report = evaluate(flat, str(rfw), DATA, protocol="rfw", options={"resamples": 0})
    assert report.unreadable == report.groups["Asian"].unreadable == 1 and report.groups["Indian"].unreadable == 0
    with pytest.raises(ValueError, match=r"African: .* embeddings are not finite"):
        evaluate(lambda images: flat(images) * torch.nan, str(rfw), DATA, protocol="rfw")


def on_a_rank(path: str) -> tuple:
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    report = evaluate(flat, path, DATA, protocol="rfw", options={"resamples": 50}, batch_size=7, **ranks)
    return report.numbers(), report.intervals


def test_any_number_of_ranks_gives_the_same(rfw, ranks):
    one = evaluate(flat, str(rfw), DATA, protocol="rfw", options={"resamples": 50}, batch_size=7)
    for size in (2, 4):
        assert all(found == (one.numbers(), one.intervals) for found in ranks(size).run(on_a_rank, str(rfw)))
