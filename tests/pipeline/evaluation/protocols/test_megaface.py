"""MegaFace in InsightFace's packing, against a float64 computation that keeps every score: noise, missing images, bad lists, ranks."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders import DataConfig
from pipeline.evaluation import evaluate
from pipeline.evaluation.megaface_lists import MegaFaceLists, read_lists
from pipeline.evaluation.protocols import megaface as module
from pipeline.evaluation.report import Report

SIDE = 16
DATA = DataConfig(image_size=SIDE, threads=1)


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def write_megaface(folder: Path, noises: bool = True) -> Path:
    """3 identities of 3 probes, 12 distractors. The second image of Ann is noise, and so are two distractors, one of them her twin."""
    rng = np.random.default_rng(0)
    lists = {"facescrub_lst": [], "megaface_lst": []}
    for name in ("Ann_Lee", "Bob", "Eve"):
        pattern = cv2.resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        for place in range(3):
            noisy = np.clip(pattern + rng.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
            if (name, place) == ("Ann_Lee", 1):
                noisy = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
            lists["facescrub_lst"].append(_write(folder / "facescrub_images", f"{name}/{name}_{20 + place}.png", noisy))
            if (name, place) == ("Ann_Lee", 0):
                twin = noisy
    for place in range(12):
        image = twin if place == 5 else rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        lists["megaface_lst"].append(_write(folder / "megaface_images", f"{place % 3}/user{place // 2}/{place}.png", image))
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    if noises:
        (folder / "facescrub_noises.txt").write_text("# of FaceScrub\nAnn_Lee_21.png\nSomebody_Else_3.png\n")
        (folder / "megaface_noises.txt").write_text("# of MegaFace\n0.9\t2/user2/5.png\n0/user0/0.png\n")
    return folder


EVERY = "".join(f"{place % 3}/user{place // 2}/{place}.png\n" for place in range(12))


def _write(folder: Path, name: str, image: np.ndarray) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / name), image)
    return name


def exact(probes: np.ndarray, identity: np.ndarray, distractors: np.ndarray) -> dict:
    """As the devkit does it, each mate alone among the distractors; ties against the mate."""
    probes, distractors = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (probes, distractors))
    own, others = np.round(probes @ probes.T, 6), np.round(probes @ distractors.T, 6)
    ahead = [
        (others[i] >= own[i, j]).sum() for i in range(len(probes)) for j in range(len(probes)) if i != j and identity[i] == identity[j]
    ]
    first, second = np.triu_indices(len(probes), 1)
    genuine = own[first, second][identity[first] == identity[second]]
    thresholds = np.append(np.inf, np.unique(np.append(genuine, others))[::-1])
    far, tar = (1 - np.searchsorted(np.sort(scores, axis=None), thresholds) / scores.size for scores in (others, genuine))
    return {f"rank{k}": np.mean([count < k for count in ahead]) for k in (1, 5, 10, 20)} | {
        "tar_at_far/1e-1": tar[far <= 0.1 + 1e-12][-1], "genuine_pairs": len(genuine), "impostor_pairs": others.size,
    }  # fmt: skip


def centred(probes: np.ndarray, identity: np.ndarray, noise: np.ndarray) -> np.ndarray:
    unit = probes / np.linalg.norm(probes, axis=1, keepdims=True)
    return np.array([unit[(identity == identity[i]) & ~noise].sum(axis=0) if noise[i] else unit[i] for i in range(len(unit))])


def test_equals_a_computation_from_the_files(tmp_path):
    folder = write_megaface(tmp_path / "mega")
    report = evaluate(flat, str(folder), DATA, protocol="megaface")
    rows = {}
    for name, images in (("facescrub_lst", "facescrub_images"), ("megaface_lst", "megaface_images")):
        faces = [cv2.imread(str(folder / images / line))[:, :, ::-1] for line in (folder / name).read_text().split()]
        both = [[part.transpose(2, 0, 1).ravel() / 127.5 - 1 for part in (face, face[:, ::-1])] for face in faces]
        rows[name] = np.array([first + second for first, second in both])
    probes, distractors, identity = rows["facescrub_lst"], rows["megaface_lst"], np.repeat(np.arange(3), 3)
    want = exact(probes, identity, distractors)
    assert {name: report.figures[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert (report.probes, report.identities, report.distractors, report.unreadable, report.left_out) == (9, 3, 12, 0, 0)
    noise, noisy = np.arange(9) == 1, np.isin(np.arange(12), (0, 5))
    refined = report.groups["refined"]
    want = exact(centred(probes, identity, noise), identity, distractors[~noisy])
    assert {name: refined.figures[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert (refined.noisy_probes, refined.noisy_distractors, refined.distractors) == (1, 2, 10)
    assert refined.rank1 == 1.0 > report.rank1


def lists_of(identity: np.ndarray, noise: np.ndarray, clean: int, noisy: int, refined: bool = True) -> MegaFaceLists:
    names = [str(number) for number in range(len(identity))], [str(number) for number in range(clean + noisy)]
    return MegaFaceLists(names[0], names[0], identity, names[1], noise, clean, refined)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_equals_keeping_all_scores_with_many_ties(data):
    """Directions on a circle in steps of 7.5 degrees; some images could not be read."""
    probes = data.draw(st.lists(st.tuples(st.integers(0, 47), st.integers(0, 3), st.booleans()), min_size=2, max_size=20))
    identity, noise = np.array([probe[1] for probe in probes]), np.array([probe[2] for probe in probes])
    noise &= ~np.isin(identity, np.setdiff1d(identity, identity[~noise]))
    clean, noisy = (data.draw(st.lists(st.integers(0, 47), min_size=least, max_size=30)) for least in (1, 0))
    angle = np.array([probe[0] for probe in probes] + clean + noisy) * (np.pi / 24)
    rows = np.column_stack([np.cos(angle), np.sin(angle)])
    read = np.flatnonzero([data.draw(st.integers(0, 9)) > 0 or keep for keep in (np.arange(len(rows)) < len(probes) + 1)])
    lists = lists_of(identity, noise, len(clean), len(noisy))
    distractors = read[read >= len(probes)]
    if np.bincount(identity).max() < 2:
        with pytest.raises(ValueError, match="no identity has two images"):
            module.compare(lists, torch.from_numpy(rows[read]).float(), read)
        return
    report = module.compare(lists, torch.from_numpy(rows[read]).float(), read)
    want = exact(rows[: len(probes)], identity, rows[distractors])
    assert {name: report.figures[name] for name in want if report.figures[name] is not None} == pytest.approx(
        {name: value for name, value in want.items() if report.figures[name] is not None}, abs=1e-12
    )


def random_set(seed: int = 0) -> tuple[MegaFaceLists, torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    identity = rng.integers(0, 12, 150)
    noise = rng.random(150) < 0.1
    probes = rng.normal(size=(12, 16))[identity] + rng.normal(size=(150, 16))
    rows = torch.from_numpy(np.concatenate([probes, rng.normal(size=(2300, 16))])).float()
    return lists_of(identity, noise, 2250, 50), rows, np.arange(len(rows))


def test_refined_and_as_listed_equal_float64_on_random_rows():
    lists, rows, numbers = random_set()
    report = module.compare(lists, rows, numbers)
    probes, distractors = rows[:150].double().numpy(), rows[150:].double().numpy()
    want = exact(probes, lists.identity_P, distractors)
    assert {name: report.figures[name] for name in want} == pytest.approx(want, abs=1e-12)
    want = exact(centred(probes, lists.identity_P, lists.noise_P), lists.identity_P, distractors[:2250])
    assert {name: report.groups["refined"].figures[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert report.tar_at_far["1e-6"] is None


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_no_bit(ranks, size):
    want = module.compare(*random_set())
    for report in ranks(size).run(_of_a_rank, *random_set()):
        assert report.as_dict() == want.as_dict()


def _of_a_rank(*of: object) -> Report:
    return module.compare(*of, rank=dist.get_rank(), world_size=dist.get_world_size())


def test_without_lists_of_noise_there_is_one_score(tmp_path):
    folder = write_megaface(tmp_path / "mega", noises=False)
    assert not evaluate(flat, str(folder), DATA, protocol="megaface").groups


def test_missing_images_are_refused_or_left_out_and_counted(tmp_path):
    folder = write_megaface(tmp_path / "mega")
    (folder / "megaface_images" / "2" / "user2" / "5.png").unlink()  # noise
    (folder / "facescrub_images" / "Bob" / "Bob_20.png").unlink()
    with pytest.raises(
        ValueError, match=r"facescrub_images lacks 1 of the 9 images of .*facescrub_lst \(Bob/Bob_20.png\).*--allow-missing"
    ):
        module.MegaFace(str(folder), DATA)
    (folder / "megaface_images" / "1" / "user0" / "1.png").write_bytes(b"no image")
    report = evaluate(flat, str(folder), DATA, protocol="megaface", options={"allow_missing": True})
    assert (report.probes, report.distractors, report.left_out, report.unreadable) == (8, 10, 2, 1)
    refined = report.groups["refined"]
    assert (refined.distractors, refined.noisy_distractors, refined.noisy_probes) == (9, 1, 1)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("facescrub_lst", "a.png\n", "facescrub_lst, line 1 is 'a.png'; expected IDENTITY/IMAGE"),
        ("facescrub_lst", "\n", "facescrub_lst is empty; expected lines IDENTITY/IMAGE"),
        ("facescrub_lst", "a/b.png\nc/d.png\na/b.png\n", "facescrub_lst names a/b.png more than once"),
        ("facescrub_lst", "../x/b.png\nAnn_Lee/Ann_Lee_21.png\nAnn_Lee/a.png\n", "names ../x/b.png, which lies outside"),
        ("megaface_lst", "a/b.png\n", "megaface_lst, line 1 is 'a/b.png'; expected FOLDER/FOLDER/IMAGE"),
        ("megaface_lst", None, "megaface_lst cannot be read .*expected facescrub_lst, megaface_lst and the folders"),
        ("megaface_noises.txt", "2/user2/5.jpg\n", "noises.txt names none of the images of megaface_lst, so nothing would be refined"),
        ("facescrub_noises.txt", "", "facescrub_noises.txt names none of the images of facescrub_lst.* Take both lists of noise away"),
        ("megaface_noises.txt", EVERY, "megaface_noises.txt names every image of megaface_lst; expected distractors that are no noise"),
        ("megaface_noises.txt", None, "has facescrub_noises.txt and no megaface_noises.txt; expected both"),
        ("facescrub_noises.txt", "Bob_20.png\nBob_21.png\nBob_22.png\n", "names every image of 1 identities of facescrub_lst, such as Bob"),
    ],
)
def test_lists_that_do_not_fit_end_in_a_sentence(tmp_path, name, text, sentence):
    folder = write_megaface(tmp_path / "mega")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        module.MegaFace(str(folder), DATA)


def test_noise_is_told_by_the_end_of_a_path(tmp_path):
    """Lists may have folders before the parts that noise is named by."""
    folder = write_megaface(tmp_path / "mega")
    lines = (folder / "megaface_lst").read_text().split()
    (folder / "megaface_lst").write_text("\n".join(f"FlickrFinal2/{line}" for line in lines))
    lists = read_lists(str(folder))
    assert lists.clean == 10 and lists.distractors[10:] == ["FlickrFinal2/0/user0/0.png", "FlickrFinal2/2/user2/5.png"]


def test_embeddings_that_are_not_finite_and_sets_without_distractors_end_in_a_sentence():
    lists, rows, numbers = random_set()
    with pytest.raises(ValueError, match="the distractors of x: there are no embeddings"):
        module.compare(lists, rows[:150], numbers[:150], name="x")
    rows[200, 0] = torch.nan
    with pytest.raises(ValueError, match="the distractors of x: the embeddings of 1 of 2250 images are not finite"):
        module.compare(lists, rows, numbers, name="x")
