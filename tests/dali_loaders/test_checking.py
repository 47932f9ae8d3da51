"""The check decodes everything and names what is wrong."""

import pytest
import torch
from pictures import picture

from dali_loaders import check, checking

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")


def test_a_healthy_set(folder, tar):
    for path in (folder, tar):
        report = check(str(path), threads=2)
        assert (report.images, report.identities, report.images_per_identity) == (24, 6, (4, 4.0, 4))
        assert report.sizes == {(32, 32): 24}
        assert report.unreadable == report.single == []
        assert "24 images of 6 identities" in str(report)


@pytest.mark.parametrize(
    ("gpu", "decoder", "told"),
    [
        (False, "auto", "JPEG decoded by: libjpeg-turbo on the CPU"),
        (True, "auto", "JPEG decoded by: nvJPEG on the GPU"),
        (True, "cpu", "JPEG decoded by: libjpeg-turbo on the CPU"),
    ],
)
def test_the_decoder_is_that_of_a_run_on_this_machine(monkeypatch, folder, gpu, decoder, told):
    class OnCpu(checking.Decoder):
        def __init__(self, size, batch_size, threads, device, *, decoder):
            super().__init__(size, batch_size, threads, torch.device("cpu"))
            self.decodes_on = "gpu" if device.type == "cuda" and decoder != "cpu" else "cpu"

    monkeypatch.setattr(checking, "Decoder", OnCpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert told in str(check(str(folder), threads=2, decoder=decoder))


def test_a_gpu_that_is_not_there(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"data\.decoder is 'gpu', but this runs on the CPU"):
        check(str(folder), decoder="gpu")


def test_what_is_wrong_is_named(folder):
    (folder / "person01" / "01.jpg").write_bytes(b"text, not an image")
    (folder / "person02" / "02.jpg").write_bytes(picture(10)[:-40])
    (folder / "person03" / "03.jpg").write_bytes(picture(3, (20, 40)))
    (folder / "single").mkdir()
    (folder / "single" / "00.png").write_bytes(picture(3, 32, ".png"))
    report = check(str(folder), threads=2)
    assert report.unreadable == [f"{folder}/person01/01.jpg", f"{folder}/person02/02.jpg"]
    assert report.single == ["single"]
    assert report.sizes == {(32, 32): 22, (40, 20): 1}
    assert report.images_per_identity == (1, 4.0, 4)
    assert "unreadable images: 2 (" in str(report)


def test_a_set_without_a_single_readable_image(tmp_path):
    (tmp_path / "set" / "anna").mkdir(parents=True)
    (tmp_path / "set" / "anna" / "1.jpg").write_bytes(b"")
    report = check(str(tmp_path / "set"))
    assert report.sizes == {}
    assert len(report.unreadable) == 1
    assert "sizes: none" in str(report)
