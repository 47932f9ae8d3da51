"""The sheet of augmented images."""

import cv2
import numpy as np
import pytest

from dali_loaders import AugmentConfig, DataConfig, open_source
from dali_loaders.preview import preview, write_preview

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

GREY = DataConfig(image_size=32, threads=1, augment=AugmentConfig(flip=False, grey=1.0, cutout=1.0))


def test_rows_begin_with_the_image_as_it_is(folder):
    source = open_source(str(folder))
    sheet, names = preview(source, GREY, images=3, versions=4, seed=1)
    assert sheet.shape == (3 * 34 - 2, 5 * 34 - 2, 3) and sheet.dtype == np.uint8
    assert names == [source.name(index) for index in (0, 12, 23)]
    for row, index in enumerate((0, 12, 23)):
        cells = [sheet[row * 34 : row * 34 + 32, column * 34 : column * 34 + 32] for column in range(5)]
        whole = cv2.imdecode(np.frombuffer(source.read(index), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(cells[0] - whole.astype(int)).max() <= 3
        assert all((cell[..., :1] == cell).all() and (cell == 128).any() for cell in cells[1:])
        assert len({cell.tobytes() for cell in cells}) == 5
    assert np.array_equal(preview(source, GREY, images=3, versions=4, seed=1)[0], sheet)
    assert not np.array_equal(preview(source, GREY, images=3, versions=4, seed=2)[0], sheet)


def test_a_small_set_has_fewer_rows_and_unreadable_images_are_passed_over(folder, tmp_path, caplog):
    source = open_source(str(folder))
    assert len(preview(source, GREY, images=100, versions=1, seed=1)[1]) == 24
    (folder / "person00" / "00.jpg").write_bytes(b"text")
    names = write_preview(str(tmp_path / "a.png"), source, GREY, images=3, versions=2)
    assert names == [source.name(index) for index in (12, 23)]
    assert caplog.messages == [f"passing over unreadable image {source.name(0)}: text"]
    sheet = preview(source, GREY, images=3, versions=2, seed=0)[0]
    assert np.array_equal(cv2.imread(str(tmp_path / "a.png"))[..., ::-1], sheet)
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"^none of 3 images of .* can be read \(.*: text.*\); see protoshard data check$"):
        preview(source, GREY, images=3, versions=2, seed=0)


@pytest.mark.parametrize(
    ("path", "options", "sentence"),
    [
        ("sheet.jpg", {}, "its name is 'sheet.jpg'; expected one that ends in .png"),
        ("no/sheet.png", {}, "no/sheet.png cannot be written: No such file or directory"),
        ("sheet.png", {"images": 0}, "a sheet of 0 images in 8 versions is empty; expected at least 1 of each"),
        ("sheet.png", {"versions": -1}, "a sheet of 8 images in -1 versions is empty"),
        ("sheet.png", {"versions": 1_000_000}, "in 1000000 versions would have more than 134217728 pixels"),
    ],
)
def test_bad_input_ends_in_a_sentence(folder, path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        write_preview(path, open_source(str(folder)), GREY, **options)
