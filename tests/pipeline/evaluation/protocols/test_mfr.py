"""The form of MFR-Ongoing: groups, children, masked against unmasked, against all scores kept."""

import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.evaluation import evaluate
from pipeline.evaluation.protocols import open_protocol
from pipeline.evaluation.protocols.mfr import compare
from tests.pipeline.people import DATA, flat, write_images

SIZES = {"African": (6, 4), "East_Asian": (5, 3), "children": (4, 3), "mask/masked": (5, 1), "mask/unmasked": (6, 2)}  # identities, images


@pytest.fixture
def mfr(tmp_path):
    """Identities have the same names in all groups; those of masked and unmasked images are the same people."""
    for group, (people, images) in SIZES.items():
        names = [f"{group}/id{person}/{image}.jpg" for person in range(people) for image in range(images)]
        write_images(tmp_path / "people", names, lambda name: "/".join(name.replace("un", "").split("/")[:-1]))
    return tmp_path / "people"


def kept(rows, labels, others=None):
    """Cosines of all pairs, or of all pairs with `others`, and whether they are genuine."""
    rows, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (rows, rows if others is None else others[0]))
    cosines, same = rows @ second.T, labels[:, None] == (labels if others is None else others[1])
    pairs = np.triu_indices_from(cosines, 1) if others is None else np.indices(cosines.shape).reshape(2, -1)
    return cosines[tuple(pairs)], same[tuple(pairs)]


def tar(cosines, same, far):
    """Accepts what is above the first impostor pair that is too many."""
    impostors = np.sort(cosines[~same])[::-1]
    return (cosines[same] > impostors[int(len(impostors) * far)]).mean()


def drawn(seed=0, width=12):
    """Embeddings and labels of each part; those of masked images are among the unmasked ones."""
    rng = np.random.default_rng(seed)
    centres, parts = rng.normal(size=(90, width)), {}
    for part, start, people, images in (
        ("African", 0, 20, 6), ("Indian", 20, 30, 5), ("children", 50, 20, 4), ("mask/masked", 70, 18, 1), ("mask/unmasked", 70, 20, 4)
    ):  # fmt: skip
        labels = np.repeat(np.arange(start, start + people), images)
        parts[part] = torch.from_numpy(centres[labels] + 0.7 * rng.normal(size=(len(labels), width))).float(), labels
    return parts


def test_equals_keeping_all_scores():
    parts = drawn()
    report = compare(parts, name="people", resamples=0)
    exact = {part: (rows.double().numpy(), labels) for part, (rows, labels) in parts.items()}
    everybody = tuple(np.concatenate(part) for part in zip(exact["African"], exact["Indian"], strict=True))
    want = {group: kept(*exact[group]) for group in ("African", "Indian", "children")}
    want["mask"] = kept(*exact["mask/masked"], exact["mask/unmasked"])
    for group, of_group in want.items():
        found = report.groups[group]
        assert found.tar_at_far["1e-3"] == pytest.approx(tar(*of_group, 1e-3), abs=1e-12)
        assert (found.genuine_pairs, found.impostor_pairs) == (of_group[1].sum(), (~of_group[1]).sum())
        assert found.tar_at_far["1e-6"] is None  # fewer impostor pairs than that
    assert report.tar_at_far["1e-4"] == pytest.approx(tar(*kept(*everybody), 1e-4), abs=1e-12)
    assert report.impostor_pairs == (~kept(*everybody)[1]).sum()
    rows = {row["group"]: (row["far"], row["tar"]) for row in report.tables["groups"]}
    assert rows == dict.fromkeys(("African", "Indian", "MR-All"), ("1e-6", None)) | {
        group: ("1e-4", report.groups[group].tar_at_far["1e-4"]) for group in ("children", "mask")
    }
    assert report.figures["mfr"] is None


def test_intervals_of_each_part():
    report = compare(drawn(), name="people", resamples=100)
    for part in (report, *report.groups.values()):
        low, high = part.intervals["tar_at_far/1e-2"]
        assert low <= part.tar_at_far["1e-2"] <= high and low < high
    assert len(report.groups) == 4


def test_the_figure_that_models_are_ordered_by():
    """A million impostor pairs."""
    rng = np.random.default_rng(0)
    rows, labels = torch.from_numpy(rng.normal(size=(1500, 8))).float(), np.repeat(np.arange(750), 2)
    parts = {"A": (rows, labels), "mask/masked": (rows[::2], labels[::2]), "mask/unmasked": (rows[1::2], labels[1::2])}
    report = compare(parts, name="people", resamples=0)
    assert report.figures["mfr"] == pytest.approx(0.75 * report.tar_at_far["1e-6"] + 0.25 * report.groups["mask"].tar_at_far["1e-4"])


def test_a_folder(mfr):
    (mfr / "readme.txt").write_text("who they are")
    report = evaluate(flat, str(mfr), DATA, protocol="mfr", batch_size=7)
    assert list(report.groups) == ["African", "East_Asian", "children", "mask"]
    images = {group: report.groups[group].images for group in ("African", "East_Asian", "children")}
    assert images == {"African": 24, "East_Asian": 15, "children": 12}
    assert (report.images, report.identities, report.unreadable) == (39, 11, 0)  # the same name in two groups is two identities
    mask = report.groups["mask"]
    assert (mask.queries, mask.gallery, mask.genuine_pairs, mask.impostor_pairs) == (5, 12, 10, 50)
    assert (mask.images, mask.identities) == (17, 6)
    assert mask.rank1 > 0.5 and "eer" in report.intervals


def test_the_remarks_name_what_is_no_group(mfr):
    (mfr / "readme.txt").write_text("who they are")
    (mfr / "mask" / "notes.csv").write_text("")
    remarks = "\n".join(open_protocol("mfr", str(mfr), DATA).source.account.remarks(str(mfr)))
    assert "readme.txt" in remarks and "mask/notes.csv" in remarks


def test_unreadable_images_count_where_they_are(mfr):
    for name in ("East_Asian/id0/0.jpg", "children/id1/1.jpg", "mask/masked/id2/0.jpg", "mask/unmasked/id2/0.jpg"):
        (mfr / name).write_bytes(b"no image")
    report = evaluate(flat, str(mfr), DATA, protocol="mfr", options={"resamples": 0})
    found = {group: of_group.unreadable for group, of_group in report.groups.items()}
    assert (report.unreadable, found) == (
        1,
        {"African": 0, "East_Asian": 1, "children": 1, "mask": 2},
    )  # the report itself is of all groups


def test_groups_alone(mfr):
    shutil.rmtree(mfr / "mask")
    shutil.rmtree(mfr / "children")
    report = evaluate(flat, str(mfr), DATA, protocol="mfr", options={"resamples": 0})
    assert list(report.groups) == ["African", "East_Asian"] and "mfr" not in report.figures


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("mask/masked", "mask/with", "has a folder mask, but no mask/masked"),
        ("children", "Children", "Children would be a group of people by its name"),
        ("mask/unmasked", "unmasked", "unmasked would be a group of people|has a folder mask, but no mask/unmasked"),
    ],
)
def test_other_forms(mfr, old, new, words):
    (mfr / old).rename(mfr / new)
    with pytest.raises(ValueError, match=words):
        evaluate(flat, str(mfr), DATA, protocol="mfr")


def test_what_cannot_be_compared(mfr, tmp_path):
    for person in (mfr / "mask" / "masked").iterdir():
        person.rename(person.with_name("other" + person.name))
    with pytest.raises(ValueError, match="mask/masked and mask/unmasked have too few identities in common"):
        evaluate(flat, str(mfr), DATA, protocol="mfr")
    write_images(tmp_path / "alone", ["A/one/1.jpg", "A/one/2.jpg"], lambda name: name)
    with pytest.raises(ValueError, match="A needs two identities, and one of them two images"):
        evaluate(flat, str(tmp_path / "alone"), DATA, protocol="mfr")
    with pytest.raises(ValueError, match="cannot be listed"):
        evaluate(flat, str(tmp_path / "nowhere"), DATA, protocol="mfr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no folder of a group of people; expected GROUP/IDENTITY/IMAGE"):
        evaluate(flat, str(tmp_path / "empty"), DATA, protocol="mfr")


def test_a_folder_too_high_is_refused(mfr, tmp_path):
    """Its parts would be taken for identities of one group."""
    shutil.copytree(mfr, tmp_path / "high" / "inner")
    with pytest.raises(ValueError, match=r"inner has folders of images inside folders, such as African/.*; expected GROUP/IDENTITY/IMAGE"):
        open_protocol("mfr", str(tmp_path / "high"), DATA)


def test_groups_that_are_called_like_figures(mfr):
    (mfr / "East_Asian").rename(mfr / "images")
    with pytest.raises(ValueError, match="a group is called images, as a figure of reports is"):
        evaluate(flat, str(mfr), DATA, protocol="mfr", options={"resamples": 0})


def test_embeddings_that_are_not_finite(mfr):
    with pytest.raises(ValueError, match="African: the embeddings of 24 of 24 images are not finite"):
        evaluate(lambda images: flat(images) * torch.nan, str(mfr), DATA, protocol="mfr")


def on_a_rank(path: str) -> dict:
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return evaluate(flat, path, DATA, protocol="mfr", options={"resamples": 20}, batch_size=7, **ranks).as_dict()


def test_any_number_of_ranks_gives_the_same(mfr, ranks):
    one = evaluate(flat, str(mfr), DATA, protocol="mfr", options={"resamples": 20}, batch_size=7).as_dict()
    for size in (2, 4):
        assert all(found == one for found in ranks(size).run(on_a_rank, str(mfr)))
