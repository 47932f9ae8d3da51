"""`protoshard match` and `protoshard search` against plain products, and what they refuse."""

from __future__ import annotations

import csv
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dali_loaders import open_source
from pipeline.cli import main
from pipeline.export import comparing, embedding_files, load
from pipeline.export.comparing import match
from pipeline.export.embed_set import embed_set
from pipeline.export.embedding_files import Rows
from pipeline.export.faiss_search import searcher


@pytest.fixture
def images(made, tmp_path) -> list[str]:
    """Two images of one identity and one of another."""
    source, paths = open_source(made.data), []
    for number in (0, 1, 6):
        paths.append(str(tmp_path / f"{number}.jpg"))
        (tmp_path / f"{number}.jpg").write_bytes(source.read(number))
    return paths


def save(path, array, **about) -> str:
    count, width = array.shape
    rows = Rows(array.astype(np.float32), [f"image {i}" for i in range(count)], [f"person {i % 3}" for i in range(count)])
    embedding_files.write(embedding_files.beside(str(path)), [rows], count, width, about)
    return str(path)


def test_two_images(made, images, capsys):
    assert main(["match", images[0], images[1], "--model", made.folder, "--far", "1e-2"]) == 0
    said = capsys.readouterr().out
    unit = load(made.folder).embed(images[:2]).double()
    cosine = float(unit[0] @ unit[1])
    threshold = load(made.folder).description.thresholds.cosine_at_far["1e-2"]
    verdict = "the same" if cosine >= threshold else "different"
    assert said == f"cosine {cosine:.4f}\n{verdict} identity at FAR 1e-2 (threshold {threshold:.4f}, measured on faces)\n"
    assert main(["match", images[0], images[0], "--model", made.run, "--far", "1e-1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decision"] is True and found["cosine"] == pytest.approx(1) and found["images"] == [1, 1]


def test_two_sets_by_their_means(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 8)), rng.normal(size=(3, 8))
    means = [(each / np.linalg.norm(each, axis=1, keepdims=True)).mean(axis=0) for each in (a, b)]
    expected = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    found = match(save(tmp_path / "a.npy", a), save(tmp_path / "b.parquet", b), None)
    assert found.cosine == pytest.approx(expected, abs=1e-6) and found.decision is None
    assert found.remarks == [
        f"{tmp_path}/{name} holds 3 identities, and their mean is compared as if they were one" for name in ("a.npy", "b.parquet")
    ]


def test_an_export_without_thresholds_decides_nothing(made, images, tmp_path, capsys):
    config = json.loads(Path(made.folder, "config.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config | {"thresholds": None}))
    (tmp_path / "bare" / "model.safetensors").symlink_to(f"{made.folder}/model.safetensors")
    assert main(["match", *images[:2], "--model", str(tmp_path / "bare"), "--far", "1e-3"]) == 2
    assert "has no thresholds, so nothing can be decided at FAR 1e-3: export it again with --data" in capsys.readouterr().err
    assert main(["match", *images[:2], "--model", str(tmp_path / "bare")]) == 0  # a cosine it has
    assert main(["match", *images[:2], "--model", made.folder, "--far", "1e-6"]) == 2
    assert "no threshold at FAR 1e-6, only at 1e-1, 1e-2, 1e-3 of faces" in capsys.readouterr().err
    assert main(["match", *images[:2], "--far", "1e-3"]) == 2
    assert "name it with --model" in capsys.readouterr().err


def test_an_image_of_another_size_is_said(made, images, tmp_path, capsys):
    import cv2

    cv2.imwrite(str(tmp_path / "large.jpg"), np.full((48, 64, 3), 80, np.uint8))
    assert main(["search", images[0], str(tmp_path), "--model", made.folder]) == 0
    assert "1 of 4 images are not 32 x 32 pixels and are stretched, such as" in capsys.readouterr().err
    assert main(["match", images[0], str(tmp_path / "large.jpg"), "--model", made.folder]) == 0
    assert "large.jpg (64 x 48 pixels) is stretched to 32 x 32; cut faces out first" in capsys.readouterr().err


@pytest.mark.parametrize("end", [".npy", ".parquet"])
def test_embeddings_that_cannot_be_compared(made, tmp_path, end):
    rng = np.random.default_rng(1)
    a = save(tmp_path / f"a{end}", rng.normal(size=(4, 8)), model="a" * 64)
    with pytest.raises(ValueError, match=r"8 numbers for each image and .* 9: they are of different models"):
        match(a, save(tmp_path / f"b{end}", rng.normal(size=(4, 9))), None)
    with pytest.raises(ValueError, match="were made by different models"):
        match(a, save(tmp_path / f"c{end}", rng.normal(size=(4, 8)), model="b" * 64), None)
    model = load(made.folder)
    with pytest.raises(ValueError, match="was made by another model than"):
        match(a, a, model)
    with pytest.raises(ValueError, match=r"8 numbers for each image and .*model gives 16"):
        match(*[save(tmp_path / f"w{end}", rng.normal(size=(4, 8)))] * 2, model, "1e-2")
    with_mirror, without = (save(tmp_path / f"{flip}{end}", rng.normal(size=(4, 16)), flip=flip) for flip in (True, False))
    with pytest.raises(ValueError, match="was made with the mirror image and the other without it"):
        match(with_mirror, without, None)
    with pytest.raises(
        ValueError, match=r"False.* was made without the mirror image, but .* embeds with it.*embed again without --no-flip"
    ):
        match(without, without, model, "1e-2")
    assert f"{with_mirror} does not say which model made it" in match(with_mirror, with_mirror, model).remarks[0]
    bad = rng.normal(size=(4, 8))
    bad[2, 5] = np.nan
    with pytest.raises(ValueError, match="the embedding of image 2, row 2, is not finite"):
        match(a, save(tmp_path / f"d{end}", bad), None)
    with pytest.raises(ValueError, match="have a mean of zero"):
        match(a, save(tmp_path / f"e{end}", np.zeros((2, 8))), None)
    with pytest.raises(ValueError, match="holds no embeddings"):
        match(a, save(tmp_path / f"f{end}", np.zeros((0, 8))), None) if end == ".parquet" else embedding_files.read(_empty(tmp_path))


def _empty(folder) -> str:
    np.save(folder / "empty.npy", np.zeros((0, 8), np.float32))
    return str(folder / "empty.npy")


def test_files_that_hold_no_embeddings(tmp_path):
    def refused(name, sentence):
        with pytest.raises(ValueError, match=sentence):
            embedding_files.read(str(tmp_path / name))

    np.save(tmp_path / "ints.npy", np.zeros((3, 4), np.int64))
    refused("ints.npy", "holds int64 of shape")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    refused("flat.npy", "a matrix of floats")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    refused("objects.npy", "not a whole .npy file of numbers")
    np.save(tmp_path / "cut.npy", np.ones((50, 40)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    refused("cut.npy", "not a whole .npy file")
    refused("missing.npy", "cannot be read")
    refused("missing.parquet", r"cannot be read|can be read")
    (tmp_path / "text.parquet").write_text("no parquet")
    refused("text.parquet", "is no Parquet file")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    refused("other.parquet", "has no column 'embedding'")
    pq.write_table(pa.table({"embedding": [[1.0], [2.0, 3.0]]}), tmp_path / "ragged.parquet")
    refused("ragged.parquet", "all of one length")
    path = save(tmp_path / "a.npy", np.ones((3, 4)))
    (tmp_path / "a.csv").write_text("identity,name\nx,y\n")
    refused("a.npy", "has 3 rows, but .*a.csv beside it names 1")
    (tmp_path / "a.csv").write_text("hello\n")
    refused("a.npy", "does not list the names")
    assert path


def test_embeddings_of_others_have_numbers_for_names(tmp_path):
    np.save(tmp_path / "theirs.npy", np.eye(3))
    found = embedding_files.read(str(tmp_path / "theirs.npy"))
    assert found.names == ["0", "1", "2"] and found.model is None and found.embedding_nD.dtype == np.float32


def test_search(made, images, tmp_path, capsys):
    embed_set(made.folder, made.data, str(tmp_path / "gallery.parquet"))
    command = ["search", str(tmp_path / "gallery.parquet"), images[0], "--model", made.folder, "--top", "3"]
    assert main(command) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    source = open_source(made.data)
    assert [row["place"] for row in rows] == ["1", "2", "3"] and rows[0]["name"] == source.name(0)
    assert rows[0]["identity"] == source.identities[source.labels[0]] and float(rows[0]["cosine"]) == pytest.approx(1, abs=1e-5)
    assert main([*command, "--out", str(tmp_path / "found.csv")]) == 0
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 4
    assert main([*command, "--out", str(tmp_path / "found.csv")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:-1], "0"]) == 2
    for out, sentence in (("found.png", "ends in .csv"), ("no/where.csv", "there is no folder")):
        assert main([*command, "--out", str(tmp_path / out)]) == 2 and sentence in capsys.readouterr().err
    assert main(["match", *images[:2], "--ema"]) == 2 and "--ema says how --model is read" in capsys.readouterr().err


def test_faiss_that_is_not_installed_costs_no_work(made, images, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("pipeline.export.comparing.embeddings_of", lambda *_: pytest.fail("images were embedded"))
    assert main(["search", *images[:2], "--model", made.folder, "--faiss"]) == 2
    assert "faiss is not installed; it comes with the extra search" in capsys.readouterr().err


def test_search_in_parts_is_a_plain_sort(tmp_path, monkeypatch, capsys):
    """Queries go through a mapped gallery a few at a time; more than the gallery has are not found."""
    rng = np.random.default_rng(0)
    gallery_GD, query_QD = rng.normal(size=(30, 6)), rng.normal(size=(11, 6))
    monkeypatch.setattr(comparing, "QUERIES", 4)
    command = ["search", save(tmp_path / "gallery.npy", gallery_GD), save(tmp_path / "query.npy", query_QD), "--top"]
    assert main([*command, "99"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    cosines = np.array([float(row["cosine"]) for row in rows]).reshape(11, 30)
    found = np.array([int(row["name"].removeprefix("image ")) for row in rows]).reshape(11, 30)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (query_QD, gallery_GD)]
    expected = unit[0] @ unit[1].T
    assert np.array_equal(found, np.argsort(-expected, axis=1)) and np.allclose(cosines, -np.sort(-expected, axis=1), atol=3e-6)
    assert main([*command, "1001"]) == 2
    assert "must be at most 1000; more are found with --faiss" in capsys.readouterr().err


def test_faiss_gives_the_same():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(3)
    gallery_GD, query_QD = rng.normal(size=(500, 16)), rng.normal(size=(20, 16))
    ours, theirs = (find(query_QD, 7) for find in (partial(comparing._neighbours, gallery_GD), searcher(gallery_GD)))
    assert np.array_equal(ours[0], theirs[0]) and np.allclose(ours[1], theirs[1], atol=2e-6)
