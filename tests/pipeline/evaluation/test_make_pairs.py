"""Pair sets are made of random pairs and of published lists, in folds, with every image at its place."""

import logging
import pickle
import tempfile

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.evaluation import read_bin
from pipeline.evaluation.make_pairs import pairs_of_list, pairs_of_set
from pipeline.evaluation.pair_lists import balanced, read_list
from pipeline.evaluation.random_pairs import random_pairs


def face(number: int) -> bytes:
    return cv2.imencode(".png", np.full((8, 8, 3), number, np.uint8))[1].tobytes()


def number_of(image: bytes) -> int:
    return int(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)[0, 0, 0])


def write(folder, sizes):
    """Person p has sizes[p] images, each with a colour of its own; the person of each colour."""
    person_of = {}
    for person, size in enumerate(sizes):
        (folder / f"p{person:02}").mkdir(parents=True)
        for image in range(size):
            (folder / f"p{person:02}" / f"{image}.png").write_bytes(face(len(person_of)))
            person_of[len(person_of)] = person
    return person_of


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.integers(1, 5), st.integers(1, 8), st.integers(0, 5))
def test_random_pairs(sizes, folds, each, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    genuine, images = sum(n * (n - 1) // 2 for n in sizes), sum(sizes)
    if min(genuine, images * (images - 1) // 2 - genuine) < folds * each:
        with pytest.raises(ValueError, match=r"people has \d+ (genuine|impostor) pairs, but"):
            random_pairs(labels, folds, each, seed, "people")
        return
    drawn = random_pairs(labels, folds, each, seed, "people")
    assert len(drawn.pairs) == 2 * folds * each and drawn.issame.tolist() == [True, False] * (folds * each)
    assert ((labels[drawn.pairs[:, 0]] == labels[drawn.pairs[:, 1]]) == drawn.issame).all()
    assert (drawn.pairs[:, 0] != drawn.pairs[:, 1]).all()
    assert len({frozenset(pair) for pair in drawn.pairs.tolist()}) == len(drawn.pairs)
    persons = [set(labels[fold].ravel().tolist()) for fold in np.split(drawn.pairs, folds)]
    if drawn.disjoint:
        assert sum(map(len, persons)) == len(set().union(*persons))
    assert np.array_equal(random_pairs(labels, folds, each, seed, "people").pairs, drawn.pairs)


def test_large_and_uneven_sets_too():
    """One person with nearly all images, of which most impostor pairs are; too many to be listed."""
    labels = np.repeat(np.arange(7), [3000, 2, 2, 2, 2, 2, 2])
    drawn = random_pairs(labels, 1, 400, 0, "people")
    assert len({frozenset(pair) for pair in drawn.pairs.tolist()}) == 800
    assert ((labels[drawn.pairs[:, 0]] == labels[drawn.pairs[:, 1]]) == drawn.issame).all()


def test_the_command(tmp_path, capsys):
    person_of = write(tmp_path / "people", [3] * 40)
    out = str(tmp_path / "out.bin")
    assert main(["data", "pairs", str(tmp_path / "people"), out, "--pairs", "4"]) == 0
    assert capsys.readouterr().out == f"80 pairs in 10 folds in {out}, 40 of them genuine\n"
    images, issame = read_bin(out)
    persons = [person_of[number_of(image)] for image in images]
    assert [first == second for first, second in zip(persons[::2], persons[1::2], strict=True)] == issame.tolist()
    folds = [set(fold.tolist()) for fold in np.split(np.array(persons), 10)]
    assert sum(map(len, folds)) == len(set(persons))
    content = pickle.loads((tmp_path / "out.bin").read_bytes())  # as InsightFace reads it
    assert all(type(image) is bytes for image in content[0]) and all(type(same) is bool for same in content[1])
    assert main(["data", "pairs", str(tmp_path / "people"), out, "--pairs", "40"]) == 2
    assert "has 120 genuine pairs, but 10 folds with 40 of each kind need 400" in capsys.readouterr().err
    assert main(["data", "pairs", str(tmp_path / "people"), str(tmp_path / "out.rec")]) == 2
    assert main(["data", "pairs", str(tmp_path / "people"), out, "--seed", "-1"]) == 2
    assert capsys.readouterr().err.endswith("--seed is -1; expected at least 0.\n")


def test_what_cannot_be_read_takes_no_part(tmp_path, caplog):
    person_of = write(tmp_path / "people", [4] * 6)
    (tmp_path / "people" / "p03" / "2.png").write_bytes(b"")
    (tmp_path / "people" / "p05" / "0.png").write_bytes(face(20)[:40])
    with caplog.at_level(logging.WARNING):
        pairs_of_set(str(tmp_path / "people"), str(tmp_path / "out.bin"), folds=2, each=10)
    images, issame = read_bin(str(tmp_path / "out.bin"))
    persons = [person_of[number_of(image)] for image in images]
    assert [first == second for first, second in zip(persons[::2], persons[1::2], strict=True)] == issame.tolist()
    assert "cannot be read and take no part" in caplog.text


def lfw(folder, extension=".jpg"):
    """Ann with images 1 to 3, Bob with 1 and 2, Cy with 1; numbers as colours."""
    for number, name in enumerate(["Ann_0001", "Ann_0002", "Ann_0003", "Bob_0001", "Bob_0002", "Cy_0001"]):
        (folder / name[:-5]).mkdir(parents=True, exist_ok=True)
        (folder / name[:-5] / f"{name}{extension}").write_bytes(face(number))


LINES = "Ann\t1\t2\nBob\t1\t2\nAnn\t1\tBob\t2\nCy\t1\tAnn\t3\n"


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("first", ["1\t2\n", "2\n", ""])
def test_pairs_of_lfw(tmp_path, extension, first):
    lfw(tmp_path / "lfw", extension)
    (tmp_path / "pairs.txt").write_text(first + LINES)
    assert "4 pairs in 1 folds" in pairs_of_list(str(tmp_path / "pairs.txt"), str(tmp_path / "lfw"), str(tmp_path / "lfw.bin"))
    images, issame = read_bin(str(tmp_path / "lfw.bin"))
    assert [number_of(image) for image in images] == [0, 1, 0, 4, 3, 4, 5, 2]  # in turn, for they are no ten folds
    assert issame.tolist() == [True, False, True, False]


def test_ten_folds_of_lfw_keep_their_order(tmp_path):
    lfw(tmp_path / "lfw")
    (tmp_path / "pairs.txt").write_text("10\t2\n" + LINES * 10)
    listed = read_list(str(tmp_path / "pairs.txt"))
    assert listed.folds == 10 and listed.issame == [True, True, False, False] * 10
    pairs_of_list(str(tmp_path / "pairs.txt"), str(tmp_path / "lfw"), str(tmp_path / "lfw.bin"))
    assert read_bin(str(tmp_path / "lfw.bin"))[1].tolist() == listed.issame


@pytest.mark.parametrize("labels", [range(1, 11), [1] * 10])
def test_pairs_of_calfw_and_cplfw(tmp_path, labels):
    """All genuine pairs come first, with their fold (CALFW) or 1 (CPLFW); impostors have 0. Each fold gets its part of both."""
    (tmp_path / "images").mkdir()
    lines, number = [], 0
    for label in [*(label for label in labels for _ in (0, 1)), *[0] * 20]:
        for _ in (0, 1):
            lines.append(f"P_{number:04}.jpg {label}\n")
            (tmp_path / "images" / f"P_{number:04}.jpg").write_bytes(face(number))
            number += 1
    (tmp_path / "pairs.txt").write_text("".join(lines))
    pairs_of_list(str(tmp_path / "pairs.txt"), str(tmp_path / "images"), str(tmp_path / "out.bin"))
    images, issame = read_bin(str(tmp_path / "out.bin"))
    assert issame.tolist() == [True, True, False, False] * 10
    assert [number_of(image) for image in images][:8] == [0, 1, 2, 3, 40, 41, 42, 43]
    assert sorted(map(number_of, images)) == list(range(80))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("10\t300\n" + LINES, "has 2 genuine and 2 impostor pairs, but its first line says 3000 of each"),
        ("1\t2\nAnn\t1\tx\n", r"line 2 is 'Ann 1 x'; expected name i j"),
        ("1\t2\nAnn\t1\t1\n", "line 2 is 'Ann 1 1'"),
        ("1\t2\nAnn\t1\tAnn\t2\n", "line 2 is 'Ann 1 Ann 2'"),
        ("a.jpg 1\nb.jpg 0\n", r"line 1 is 'a\.jpg 1' and the next is 'b\.jpg 0'; expected two images with the same label"),
        ("a.jpg 1\nb.jpg 1\nc.jpg 0\n", r"line 3 is 'c\.jpg 0' and the next is ''"),
        ("Ann\t1\t2\nAnn\t1\t9\nDan\t1\tAnn\t1\n", r"lacks 2 of the 4 images of .*pairs\.txt \(Ann_0009, Dan_0001\)"),
    ],
)
def test_lists_that_are_wrong(tmp_path, text, words):
    lfw(tmp_path / "lfw")
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        pairs_of_list(str(tmp_path / "pairs.txt"), str(tmp_path / "lfw"), str(tmp_path / "lfw.bin"))
    assert not (tmp_path / "lfw.bin").exists()


@settings(deadline=None)
@given(st.binary(max_size=80) | st.text(st.sampled_from("an_.jpg 0123456789\\t\\n"), max_size=80).map(str.encode))
def test_any_bytes_are_a_list_or_end_in_a_sentence(data):
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(data)
        file.flush()
        try:
            listed = read_list(file.name)
            assert len(listed.pairs) == len(listed.issame) and sorted(balanced(listed)) == list(range(len(listed.pairs)))
        except ValueError as error:
            assert file.name in str(error)


def test_faces_of_a_list_are_cut_out(tmp_path):
    lfw(tmp_path / "lfw")
    (tmp_path / "pairs.txt").write_text(LINES)
    points = ",".join(f"{x:.2f},{y:.2f}" for x, y in [(2.7, 3.7), (5.3, 3.7), (4, 5.1), (3, 6.6), (5.1, 6.6)])
    (tmp_path / "points.csv").write_text("".join(f"Ann/Ann_000{n}.jpg,{points}\n" for n in (1, 2, 3)))
    arguments = [str(tmp_path / "pairs.txt"), str(tmp_path / "lfw"), str(tmp_path / "lfw.bin"), str(tmp_path / "points.csv")]
    with pytest.raises(ValueError, match=r"3 of the 6 images of .* cannot be used: .*Bob_0001\.jpg \(no landmarks in points\.csv\)"):
        pairs_of_list(*arguments)
    with open(tmp_path / "points.csv", "a") as file:
        file.write("".join(f"{name[:-5]}/{name}.jpg,{points}\n" for name in ("Bob_0001", "Bob_0002", "Cy_0001")))
    pairs_of_list(*arguments)
    assert cv2.imdecode(np.frombuffer(read_bin(arguments[2])[0][0], np.uint8), cv2.IMREAD_COLOR).shape == (112, 112, 3)
