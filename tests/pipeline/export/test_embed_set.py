"""`protoshard embed`: the embeddings of `protoshard eval`, on any number of ranks, broken off anywhere, and what is unreadable listed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dali_loaders import open_source
from pipeline.cli import main
from pipeline.export import embed_set as module
from pipeline.export import embedding_files, load
from pipeline.export.embed_set import embed_set
from tests.pipeline.export.test_model_folder import ROOT, evaluated


def read(path) -> np.ndarray:
    return np.asarray(embedding_files.read(str(path)).embedding_nD)


@pytest.fixture
def few(made, tmp_path) -> Path:
    """A folder of 30 images, of which two cannot be read and one has another size."""
    source = open_source(made.data)
    for number in range(30):
        (tmp_path / "few" / f"id{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "few" / f"id{number % 3}" / f"{number:02}.jpg").write_bytes(source.read(number))
    (tmp_path / "few" / "id1" / "04.jpg").write_bytes(b"<html>")
    (tmp_path / "few" / "id2" / "05.jpg").write_bytes(source.read(5)[:300])
    cv2.imwrite(str(tmp_path / "few" / "id0" / "06.jpg"), np.full((50, 70, 3), 90, np.uint8))
    return tmp_path / "few"


@pytest.mark.parametrize("model", ["run", "folder"])
def test_the_embeddings_of_eval_to_the_bit(made, tmp_path, model):
    out = tmp_path / "out.npy"
    result = embed_set(getattr(made, model), made.data, str(out), chunk=48)
    assert np.array_equal(np.load(out), evaluated(made).numpy())
    assert result == (78, 16, 0, "DALI", None) and sorted(os.listdir(tmp_path)) == ["out.csv", "out.json", "out.npy"]
    source = open_source(made.data)
    rows = list(csv.reader((tmp_path / "out.csv").open()))
    assert rows[0] == ["identity", "name"] and len(rows) == 79
    assert rows[78] == [source.identities[source.labels[77]], source.name(77)]


def test_parquet_and_npy_hold_the_same(made, few, tmp_path):
    for name in ("a.npy", "a.parquet"):
        assert main(["embed", made.folder, str(few), str(tmp_path / name)]) == 1  # two are left out
        listed = (tmp_path / f"{name}.unreadable.txt").read_text().splitlines()
        assert [os.path.basename(line.partition("\t")[0]) for line in listed] == ["04.jpg", "05.jpg"]
        assert listed[0].endswith("HTML page (a download that failed)") and listed[1].endswith("cut off")
    npy, parquet = (embedding_files.read(str(tmp_path / name)) for name in ("a.npy", "a.parquet"))
    assert np.array_equal(npy.embedding_nD, parquet.embedding_nD) and len(npy.embedding_nD) == 28
    assert list(npy.names) == list(parquet.names) and list(npy.identities) == list(parquet.identities)
    assert npy.model == parquet.model == load(made.folder).description.weights
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["name", "identity", "embedding"] and table["identity"][0].as_py() == "id0"


@pytest.mark.parametrize("decoder", ["dali", "opencv"])
def test_stretched_images_are_counted(made, few, tmp_path, capsys, decoder):
    """By their headers or once decoded, in whichever chunk they are; also of a format whose header only the decoder knows."""
    image = cv2.imread(str(few / "id1" / "01.jpg"))
    cv2.imwrite(str(few / "id2" / "zz.bmp"), cv2.resize(image, (32, 33)))
    result = embed_set(made.folder, str(few), str(tmp_path / "out.npy"), decoder=decoder, chunk=24)
    assert result.remark == (
        f"{few}: 2 of 29 images are not 32 x 32 pixels and are stretched, such as {few}/id0/06.jpg (70 x 50 pixels); "
        "cut faces out first (protoshard data pack --landmarks)"
    )
    (few / "id0" / "06.jpg").unlink(), (few / "id2" / "zz.bmp").unlink()
    assert main(["embed", made.folder, str(few), str(tmp_path / "none.npy")]) == 1
    assert "are stretched" not in capsys.readouterr().out


def _embed(model: str, images: str, out: str) -> None:
    embed_set(model, images, out, chunk=24)


def test_ranks_give_the_same(made, tmp_path, ranks):
    """With as many threads each, that is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _embed(made.folder, made.data, str(tmp_path / "1.npy"))
    finally:
        torch.set_num_threads(threads)
    ranks(2).run(_embed, made.folder, made.data, str(tmp_path / "2.npy"))
    assert np.array_equal(np.load(tmp_path / "1.npy"), np.load(tmp_path / "2.npy"))


def test_without_dali(made, tmp_path):
    """In a process that cannot import it, from the export alone. Images have the model's size, so the bits are the same."""
    absent = ("nvidia", "deepspeed", "ray", "tensorboard", "simplejpeg", "xxhash", "matplotlib", "psutil", "pyarrow")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import torch; torch.set_num_threads({torch.get_num_threads()}); "
        "from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, "embed", made.folder, made.data, str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and "decoded with OpenCV" in done.stdout, done.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), evaluated(made).numpy())


def test_one_that_is_broken_off_goes_on(made, tmp_path, monkeypatch, capsys):
    out, real, seen = tmp_path / "out.parquet", module.embed_images, []

    def breaking(*arguments):
        seen.append(int(arguments[2][0]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "embed_images", breaking)
    monkeypatch.setattr(module, "CHUNK", 24)
    settings = {"chunk": 24}
    with pytest.raises(KeyboardInterrupt):
        embed_set(made.folder, made.data, str(out), **settings)
    assert os.listdir(tmp_path) == ["out.parquet.partial"]
    with pytest.raises(ValueError, match="cannot be read"):
        embedding_files.read(str(out.with_suffix(".npy")))
    (tmp_path / "out.parquet.partial" / "chunk-000000.npz").write_bytes(b"PK cut off")  # as a power cut may leave it
    embed_set(made.folder, made.data, str(out), **settings)
    assert seen == [0, 24, 48, 0, 48, 72]  # what was done is not done again
    assert os.listdir(tmp_path) == ["out.parquet"]
    assert np.array_equal(read(out), evaluated(made).numpy())


def test_one_that_is_broken_off_while_it_is_joined_goes_on(made, tmp_path, monkeypatch):
    """Between the renames of OUT.csv and OUT.npy, at the worst."""
    rename, count = os.rename, []

    def failing(source, target):
        count.append(target)
        if str(target).endswith(".npy"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            embed_set(made.folder, made.data, str(tmp_path / "out.npy"))
    assert count and not (tmp_path / "out.npy").exists()
    embed_set(made.folder, made.data, str(tmp_path / "out.npy"))
    assert np.array_equal(read(tmp_path / "out.npy"), evaluated(made).numpy())


def test_a_file_that_appears_meanwhile_is_kept(made, tmp_path, monkeypatch):
    """OUT.csv could be a table of the user's; only one that a former try has put there is replaced."""
    real = module.embedding_files.write

    def appearing(*arguments):
        (tmp_path / "out.csv").write_text("mine")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.embedding_files, "write", appearing)
        with pytest.raises(ValueError, match=r"out\.csv exists already"):
            embed_set(made.folder, made.data, str(tmp_path / "out.npy"))
    assert (tmp_path / "out.csv").read_text() == "mine" and not (tmp_path / "out.npy").exists()
    (tmp_path / "out.csv").unlink()
    embed_set(made.folder, made.data, str(tmp_path / "out.npy"))  # from what is done


def test_a_part_of_other_embeddings_is_not_gone_on_with(made, few, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed_set(made.folder, str(few), str(tmp_path / "out.npy"))
    for change in ({"flip": False}, {"decoder": "opencv"}):
        with pytest.raises(ValueError, match="holds a part of other embeddings"):
            embed_set(made.folder, str(few), str(tmp_path / "out.npy"), **change)
    with pytest.raises(ValueError, match="holds a part of other embeddings"):
        embed_set(made.folder, made.data, str(tmp_path / "out.npy"))


def test_a_set_elsewhere_with_the_same_names_is_another_job(made, few, tmp_path, monkeypatch):
    shutil.copytree(few, tmp_path / "others")
    out = str(tmp_path / "out.npy")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed_set(made.folder, str(few), out)
    with pytest.raises(ValueError, match="holds a part of other embeddings"):
        embed_set(made.folder, str(tmp_path / "others"), out)
    monkeypatch.chdir(few.parent)
    embed_set(made.folder, "few/../few", out)  # the same one under another name


def test_a_tar_that_was_written_anew_is_another_job(made, tmp_path):
    shutil.copy(made.data, tmp_path / "set.tar")
    before = module.place_of(str(tmp_path / "set.tar"))
    assert module.place_of(f" {tmp_path}/./set.tar") == before
    os.utime(tmp_path / "set.tar", (1, 1))
    assert module.place_of(str(tmp_path / "set.tar")) != before


def test_two_commands_do_not_write_one_file(made, tmp_path):
    lock, fault = module.begin(str(tmp_path / "out.npy.partial"), {})
    assert fault is None
    with pytest.raises(ValueError, match="is being written by another command"):
        embed_set(made.folder, made.data, str(tmp_path / "out.npy"))
    os.close(lock)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("out.txt", "must end in .parquet or .npy"),
        ("there.npy", "exists already"),
        ("no/where/out.npy", "cannot be written|embeddings"),
        ("s3://K:S@bucket/out.npy", "s3://***@bucket/out.npy is an address"),
    ],
)
def test_an_impossible_output_is_refused_before_the_work(made, tmp_path, out, sentence, monkeypatch, capsys):
    (tmp_path / "there.npy").write_bytes(b"x")
    (tmp_path / "no").write_bytes(b"a file, and no folder")
    monkeypatch.setattr(module, "embed_images", lambda *_: pytest.fail("images were embedded"))
    assert main(["embed", made.folder, made.data, out if "://" in out else str(tmp_path / out)]) == 2
    assert sentence.split("|")[0] in capsys.readouterr().err and (tmp_path / "there.npy").read_bytes() == b"x"


def test_a_parquet_that_could_not_be_written_costs_no_work(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(module, "embed_images", lambda *_: pytest.fail("images were embedded"))
    with pytest.raises(ValueError, match=r"pyarrow.* is not installed; it comes with the extra parquet"):
        embed_set(made.folder, made.data, str(tmp_path / "out.parquet"))


def test_a_full_disk(made, tmp_path, monkeypatch, capsys):
    """What is done stays, and the command goes on from it once there is room."""
    real, calls = np.savez, []

    def full(*arguments, **arrays):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match=r"out\.npy\.partial cannot be written \(No space left on device\): the same command goes on"):
        embed_set(made.folder, made.data, str(tmp_path / "out.npy"), chunk=24)
    embed_set(made.folder, made.data, str(tmp_path / "out.npy"), chunk=24)
    assert len(calls) == 5 and np.array_equal(read(tmp_path / "out.npy"), evaluated(made).numpy())  # 4 chunks, one tried twice


def test_an_embedding_that_is_not_finite_is_named(made, tmp_path, monkeypatch):
    bad = load(made.folder)
    next(bad.network.parameters()).data.fill_(float("inf"))
    monkeypatch.setattr(module, "open_model", lambda *_, **__: bad)
    with pytest.raises(ValueError, match=r"an embedding that is not finite for .*000000"):
        embed_set(made.folder, made.data, str(tmp_path / "out.npy"))
    assert not (tmp_path / "out.npy").exists()


def test_no_image_can_be_decoded(made, tmp_path, capsys):
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "1.jpg").write_bytes(b"")
    assert main(["embed", made.folder, str(tmp_path / "bad"), str(tmp_path / "out.npy")]) == 2
    assert "none of its 1 images can be decoded, such as" in capsys.readouterr().err
    (tmp_path / "bad" / "a" / "1.jpg").write_bytes(open_source(made.data).read(0))  # mended
    assert main(["embed", made.folder, str(tmp_path / "bad"), str(tmp_path / "out.npy")]) == 0


def test_a_folder_without_identities_and_one_image(made, few, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("00.jpg", "03.jpg"):
        shutil.copy(few / "id0" / name, flat / name)
    (flat / "notes.txt").write_text("no image")
    embed_set(made.folder, str(flat), str(tmp_path / "flat.npy"))
    embed_set(made.folder, str(flat / "03.jpg"), str(tmp_path / "one.npy"))
    found = embedding_files.read(str(tmp_path / "flat.npy"))
    assert [os.path.basename(name) for name in found.names] == ["00.jpg", "03.jpg"] and list(found.identities) == ["", ""]
    assert np.allclose(read(tmp_path / "one.npy"), load(made.folder).embed([flat / "03.jpg"]).numpy(), atol=1e-6)
    assert json.loads((tmp_path / "one.json").read_text())["rows"] == 1
