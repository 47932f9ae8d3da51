"""The check decodes everything, names what is wrong, and writes the set without it."""

import json
from pathlib import Path

import pytest
import torch
from pictures import picture, write_folder

from dali_loaders import check, open_source
from dali_loaders.checking import findings
from dali_loaders.checking import report as reporting
from dali_loaders.encoded import groups
from dali_loaders.recordio.records import IRHeader, RecordWriter, pack_record

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")


def cut_in_half(jpeg: bytes) -> bytes:
    """With a new end marker, as some repairing programs leave it."""
    return jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9"


def test_a_healthy_set(folder, tar):
    for path in (folder, tar):
        report = check(str(path), threads=2)
        assert (report.images, report.identities, report.images_per_identity) == (24, 6, (4, 4.0, 4))
        assert report.sizes == {(32, 32): 24}
        assert report.unreadable == report.damaged == report.single == report.copies == report.contradictions == report.wrong == []
        assert report.account.seen == report.account.used == 24
        assert "24 images of 6 identities" in str(report) and str(report).endswith("wrong: nothing")


@pytest.mark.parametrize(
    ("gpu", "decoder", "told"),
    [
        (False, "auto", "JPEG decoded by: libjpeg-turbo on the CPU"),
        (True, "auto", "JPEG decoded by: nvJPEG on the GPU"),
        (True, "cpu", "JPEG decoded by: libjpeg-turbo on the CPU"),
    ],
)
def test_the_decoder_is_that_of_a_run_on_this_machine(monkeypatch, folder, gpu, decoder, told):
    class OnCpu(findings.Decoder):
        def __init__(self, size, batch_size, threads, device, *, decoder):
            super().__init__(size, batch_size, threads, torch.device("cpu"))
            self.decodes_on = "gpu" if device.type == "cuda" and decoder != "cpu" else "cpu"

    monkeypatch.setattr(findings, "Decoder", OnCpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert told in str(check(str(folder), threads=2, decoder=decoder))


def test_a_gpu_that_is_not_there(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"data\.decoder is 'gpu', but this runs on the CPU"):
        check(str(folder), decoder="gpu")


@pytest.fixture
def faulty(folder: Path) -> Path:
    """With one fault of each kind."""
    (folder / "person00" / "00.jpg").write_bytes(cut_in_half(picture(0)))
    (folder / "person01" / "01.jpg").write_bytes(b"text, not an image")
    (folder / "person02" / "02.jpg").write_bytes(picture(10)[:-40])
    (folder / "person03" / "03.jpg").write_bytes(picture(3, (20, 40)))
    (folder / "person04" / "04.jpg").write_bytes(picture(16))  # as 00.jpg
    (folder / "person05" / "04.jpg").write_bytes(picture(17))  # as person04/01.jpg
    (folder / "single").mkdir()
    (folder / "single" / "00.png").write_bytes(picture(3, 32, ".png"))
    (folder / "readme.txt").write_text("of a set")
    return folder


def test_what_is_wrong_is_named(faulty):
    report = check(str(faulty), threads=2)
    assert report.unreadable == [(f"{faulty}/person01/01.jpg", "text"), (f"{faulty}/person02/02.jpg", "cut off")]
    assert report.damaged == [(f"{faulty}/person00/00.jpg", "damaged inside (premature end of data segment)")]
    assert report.copies == [[f"{faulty}/person04/00.jpg", f"{faulty}/person04/04.jpg"]]
    assert report.contradictions == [[f"{faulty}/person04/01.jpg (person04)", f"{faulty}/person05/04.jpg (person05)"]]
    assert report.single == ["single"]
    assert report.sizes == {(32, 32): 24, (40, 20): 1}
    assert report.images_per_identity == (1, 4.0, 5)
    assert (report.account.seen, report.account.used) == (28, 27)
    assert report.wrong == ["2 unreadable image(s)", "1 damaged image(s)", "1 image(s) under several identities"]
    text = str(report)
    assert f"unreadable images: 2\n  {faulty}/person01/01.jpg: text\n  {faulty}/person02/02.jpg: cut off\n" in text
    assert "28 seen, 27 used, 1 passed over" in text and "readme.txt" in text
    assert text.endswith("wrong: 2 unreadable image(s); 1 damaged image(s); 1 image(s) under several identities")


def test_long_lists_are_shortened_for_people(folder):
    for number in range(12):
        (folder / "person01" / f"x{number:02}.jpg").write_bytes(b"")
    assert "unreadable images: 12\n" in (text := str(check(str(folder), threads=2)))
    assert text.count(": empty") == 10 and "\n  and 2 more\n" in text


def test_the_report_as_json(faulty):
    report = json.loads(json.dumps(check(str(faulty), threads=2).as_dict()))
    assert report["images"] == 27 and report["files"]["seen"] == 28
    assert report["unreadable"][1] == {"name": f"{faulty}/person02/02.jpg", "reason": "cut off"}
    assert report["sizes"][0] == {"width": 32, "height": 32, "images": 24}
    assert len(report["wrong"]) == 3


def test_a_clean_set_is_written_with_a_list_of_what_was_left_out(faulty, tmp_path):
    out = tmp_path / "clean.rec"
    report = check(str(faulty), threads=2, fix=str(out))
    assert report.clean is not None and (report.clean.account.seen, report.clean.account.used) == (27, 21)
    assert str(report).splitlines()[-7:] == [
        f"21 images of 7 identities in {out}",
        f"left out: 6 of 27 images, listed in {tmp_path}/clean.left_out.txt",
        f"  1 damaged inside (premature end of data segment): {faulty}/person00/00.jpg",
        f"  1 text: {faulty}/person01/01.jpg",
        f"  1 cut off: {faulty}/person02/02.jpg",
        f"  2 the same image under several identities: {faulty}/person04/01.jpg, {faulty}/person05/04.jpg",
        f"  1 the same image as another: {faulty}/person04/04.jpg",
    ]
    left_out = [line.split("\t") for line in (tmp_path / "clean.left_out.txt").read_text().splitlines()]
    assert left_out == [
        [f"{faulty}/person00/00.jpg", "damaged inside (premature end of data segment)"],
        [f"{faulty}/person01/01.jpg", "text"],
        [f"{faulty}/person02/02.jpg", "cut off"],
        [f"{faulty}/person04/01.jpg", "the same image under several identities: person04 and person05"],
        [f"{faulty}/person04/04.jpg", f"the same image as another: {faulty}/person04/00.jpg"],
        [f"{faulty}/person05/04.jpg", "the same image under several identities: person04 and person05"],
    ]
    source, clean = open_source(str(faulty)), open_source(str(out))
    kept = [index for index in range(len(source)) if source.name(index) not in dict(left_out)]
    assert [clean.read(index) for index in range(len(clean))] == [source.read(index) for index in kept]
    assert clean.identities == source.identities
    report = check(str(out), threads=2)
    assert report.wrong == [] and report.images == 21 and report.copies == []


def test_an_identity_of_which_nothing_is_left_has_no_label(folder, tmp_path):
    for file in (folder / "person02").iterdir():
        file.write_bytes(b"")
    report = check(str(folder), threads=2, fix=str(tmp_path / "clean.rec"))
    assert str(report).endswith("identities without a packed image, so left out: 1 (person02)")
    clean = json.loads(json.dumps(report.as_dict()))["clean"]
    assert (clean["identities"], clean["lost"], clean["images"]["used"]) == (5, ["person02"], 20)
    assert open_source(str(tmp_path / "clean.rec")).identities == ["person00", "person01", "person03", "person04", "person05"]


@pytest.mark.parametrize(
    ("out", "words"), [("clean.tar", "ends in .rec"), ("none/clean.rec", "cannot be written to the folder"), ("set.rec", "another name")]
)
def test_a_clean_set_that_cannot_be_written_is_refused_before_the_check(monkeypatch, tmp_path, out, words):
    write_rec(tmp_path / "set.rec", [0, 1])
    monkeypatch.setattr(reporting, "look", None)
    with pytest.raises(ValueError, match=words):
        check(str(tmp_path / "set.rec"), fix=str(tmp_path / out))


def test_a_set_without_a_single_readable_image(tmp_path):
    (tmp_path / "set" / "anna").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "set" / "anna" / f"{number}.jpg").write_bytes(b"")
    report = check(str(tmp_path / "set"))
    assert report.sizes == {} and report.copies == []
    assert [reason for _, reason in report.unreadable] == ["empty", "empty"]
    assert "sizes: none" in str(report)
    with pytest.raises(ValueError, match="nothing would be left of its 2 images"):
        check(str(tmp_path / "set"), fix=str(tmp_path / "clean.rec"))
    assert not list(tmp_path.glob("clean*"))


def test_unreadable_files_keep_the_systems_reason(folder, monkeypatch):
    source = open_source(str(folder))
    denied = source.name(5)
    read = type(source).read

    def refuse(self, index):
        if self.name(index) == denied:
            raise PermissionError(13, "Permission denied")
        return read(self, index)

    monkeypatch.setattr(type(source), "read", refuse)
    assert check(str(folder), threads=2).unreadable == [(denied, "permission denied")]


def test_files_that_may_be_a_loss_are_wrong_and_others_are_not(folder, monkeypatch):
    report = check(str(folder), threads=2)
    report.account.pass_over("no image by its content (.txt)", "a.txt", 3)
    report.account.pass_over("hidden file", ".x")
    assert report.wrong == []
    report.account.pass_over("HEIC image, which is not decoded; convert it to JPEG", "a.heic", 2)
    assert report.wrong == ["2 passed over: HEIC image, which is not decoded; convert it to JPEG"]


def write_rec(path: Path, labels: list[int]) -> str:
    with RecordWriter(str(path)) as writer:
        for key, label in enumerate(labels):
            writer.write(key, pack_record(IRHeader(0, float(label), key, 0), picture(key)))
    return str(path)


def test_labels_that_are_not_contiguous(tmp_path):
    assert check(write_rec(tmp_path / "whole.rec", [0, 1, 1, 2]), threads=2).labels is None
    report = check(write_rec(tmp_path / "gaps.rec", [3, 7, 7, 4]), threads=2)
    assert report.labels == "3 to 7, 2 numbers between are not used; training numbers them 0 to 2"
    assert "labels: 3 to 7" in str(report) and report.wrong == []


def test_memory_is_bounded_by_pixels_and_bytes(tmp_path, monkeypatch):
    """Groups of a few pixels, and parts of a few bytes, find the same."""
    path = str(write_folder(tmp_path / "set", identities=3, images=9))
    (tmp_path / "set" / "person01" / "04.jpg").write_bytes(picture(1)[:-9])
    (tmp_path / "set" / "person02" / "01.jpg").write_bytes(cut_in_half(picture(4)))
    whole = check(path, threads=2)
    batches = []

    class Counting(findings.Decoder):
        def __call__(self, encoded, arguments):
            batches.append(len(encoded))
            return super().__call__(encoded, arguments)

    monkeypatch.setattr(findings, "Decoder", Counting)
    monkeypatch.setattr(findings, "_BYTES", 10_000)
    monkeypatch.setattr(findings, "groups", lambda sizes_b2: groups(sizes_b2, 3 * 32 * 32))
    parts = check(path, threads=2)
    assert parts.as_dict() == whole.as_dict() and len(parts.unreadable) == len(parts.damaged) == 1
    assert max(batches) == 3 and sum(batches) == 26
