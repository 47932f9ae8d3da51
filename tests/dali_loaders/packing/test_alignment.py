"""Faces are brought to the template by their landmarks, and every line of the landmarks is accounted for."""

import tempfile

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture, write_folder

from dali_loaders import open_source, pack
from dali_loaders.packing import PackConfig
from dali_loaders.packing.alignment import SIDE, TEMPLATE_52, is_mirrored, similarity
from dali_loaders.packing.landmarks import read_landmarks
from dali_loaders.packing.pixels import align


def umeyama(points, target):
    """Equations 38 to 43 of the paper, with a singular value decomposition."""
    p, q = points - points.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(q.T @ p / len(p))
    s = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    scale = np.trace(np.diag(d) @ s) / p.var(axis=0).sum()
    turn = scale * u @ s @ vt
    return np.column_stack([turn, target.mean(0) - turn @ points.mean(0)])


def moved(points, scale, angle, shift):
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn.T + shift, np.column_stack([turn, shift])


numbers = st.floats(-200, 200, allow_nan=False)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=5, max_size=5))
def test_is_the_solution_of_umeyama(points):
    points = np.array(points)
    p, q = points - points.mean(0), TEMPLATE_52 - TEMPLATE_52.mean(0)
    if np.ptp(points, axis=0).max() < 1 or min(abs((p * q).sum()), abs(np.linalg.det(p.T @ q))) < 1e-3:
        return  # a point, or two solutions
    assert similarity(points, TEMPLATE_52) == pytest.approx(umeyama(points, TEMPLATE_52), abs=1e-6)


@given(st.floats(0.01, 50), st.floats(-np.pi, np.pi), numbers, numbers)
def test_recovers_a_known_similarity(scale, angle, x, y):
    target, matrix = moved(TEMPLATE_52, scale, angle, (x, y))
    assert similarity(TEMPLATE_52, target) == pytest.approx(matrix, rel=1e-9, abs=1e-6)


def test_mirrored_points_do_not_reflect_the_image():
    mirrored = TEMPLATE_52 * (-1, 1) + (SIDE, 0)
    matrix = similarity(mirrored, TEMPLATE_52)
    assert np.linalg.det(matrix[:, :2]) > 0
    assert is_mirrored(mirrored) and not is_mirrored(TEMPLATE_52)
    with pytest.raises(ValueError, match="one point"):
        similarity(np.full((5, 2), 3.7), TEMPLATE_52)
    for far in (1e300, np.inf, np.nan):
        with pytest.raises(ValueError, match="the landmarks are too far away"):
            similarity(np.full((5, 2), far), TEMPLATE_52)


@pytest.mark.parametrize("scale", [0.7, 1.0, 4.0, 11.3])
def test_landmarks_come_to_lie_on_the_template(scale):
    """White discs on black, in a photo of any size."""
    points, _ = moved(TEMPLATE_52, scale, 0.4, (60 * scale, 20 * scale))
    image = np.zeros((int(200 * scale), int(200 * scale), 3), np.uint8)
    for x, y in points:
        cv2.circle(image, (round(x * 16), round(y * 16)), round(3 * scale * 16), (255, 255, 255), -1, cv2.LINE_AA, shift=4)
    face = align(image, points)[..., 0].astype(np.float64)
    assert face.shape == (SIDE, SIDE)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for x, y in TEMPLATE_52:
        near = face * (np.hypot(columns - x, rows - y) < 8)
        assert ((near * columns).sum() / near.sum(), (near * rows).sum() / near.sum()) == pytest.approx((x, y), abs=0.3)


def test_large_photos_are_averaged_not_sampled():
    """Grey of alternating black and white lines stays grey."""
    image = np.zeros((1600, 1600, 3), np.uint8)
    image[::2] = 255
    points, _ = moved(TEMPLATE_52, 10.0, 0.0, (200, 200))
    assert np.abs(align(image, points)[20:90, 20:90].astype(int) - 128).max() <= 8


LINE = ",".join(f"{x:.2f},{y:.2f}" for x, y in TEMPLATE_52 * 32 / 112)
MIRRORED = ",".join(f"{32 - x:.2f},{y:.2f}" for x, y in TEMPLATE_52 * 32 / 112)


@pytest.fixture
def two(tmp_path):
    """2 identities with 2 images of 32 x 32."""
    return write_folder(tmp_path / "set", identities=2, images=2)


def lines(two, text):
    path = two.parent / "points.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return pack(open_source(str(two)), str(two.parent / "out.rec"), PackConfig(landmarks=str(path)))


def test_packs_faces(two):
    """With headings, a byte order mark, paths below the set and paths that lead into it, quotes, and an exact repetition."""
    text = "\ufeffpath," + ",".join(f"x{n},y{n}" for n in range(5))
    text += f'\r\nperson00/00.jpg,{LINE}\r\n"{two}/person00/01.jpg",{LINE}\r\n./person01/00.jpg,{LINE}\r\nperson01/01.jpg,{LINE}\r\n'
    report = lines(two, text + f"person01/01.jpg,{LINE}\r\n")
    assert report.account.used == 4 and not report.unused_landmarks
    source = open_source(str(two.parent / "out.rec"))
    face = cv2.imdecode(np.frombuffer(source.read(0), np.uint8), cv2.IMREAD_COLOR)
    whole = cv2.resize(cv2.imdecode(np.frombuffer(picture(0), np.uint8), cv2.IMREAD_COLOR), (SIDE, SIDE))
    assert face.shape == (SIDE, SIDE, 3)
    assert np.abs(face.astype(int) - whole)[8:-8, 8:-8].mean() < 8  # the points are those of the whole image


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_spreadsheets_write(two, separator):
    """Another separator, Windows line ends, empty lines, and the path of a folder behind a link."""
    link = two.parent / "link"
    link.symlink_to(two)
    rows = [f"{two}/person00/00.jpg,{LINE}", "", "  ", f"person01/01.jpg,{LINE}"]
    path = two.parent / "points.csv"
    path.write_bytes("\r\n".join(rows).replace(",", separator).encode())
    report = pack(open_source(str(link)), str(two.parent / "out.rec"), PackConfig(landmarks=str(path)))
    assert report.account.used == 2 and not report.unused_landmarks


def test_every_line_and_image_is_accounted_for(two):
    nan, far = LINE.replace(LINE.split(",")[3], "nan", 1), ",".join(["900,900"] * 5)
    report = lines(two, f"person00/00.jpg,{LINE}\nperson00/01.jpg,{nan}\nperson01/00.jpg,{far}\nperson07/00.jpg,{LINE}\n")
    assert {reason: passed.count for reason, passed in report.account.passed_over.items()} == {
        "landmarks that are not finite": 1,
        "landmarks outside of the image (32 x 32 pixels)": 1,
        "no landmarks in points.csv": 1,
    }
    assert report.unused_landmarks == ["person07/00.jpg"] and report.lost == ["person01"]
    assert "landmarks without an image: 1 (person07/00.jpg)" in str(report)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"person00/00.jpg,{LINE},1\n", r"points\.csv, line 1 has 12 columns; expected path,x1,y1"),
        (f"path,x\nperson00/00.jpg,{LINE}\n1;2;3\n", r"line 3 has 1 columns"),
        (f"person00/00.jpg,{LINE}\nperson00/01.jpg,a{LINE}\n", r"line 2 \(person00/01\.jpg\) has a column that is no number"),
        (f"person00/00.jpg,{LINE}\nperson00/00.jpg,1{LINE}\n", r"line 2 gives person00/00\.jpg other landmarks"),
        (f"00.jpg,{LINE}\n", r"none of its 1 lines names an image of the set: its first is for 00\.jpg"),
        (f"person00/00.jpg,{MIRRORED}\nperson00/01.jpg,{MIRRORED}\n", r"2 of 2 faces fit the template only as mirror images"),
        ("", "holds no landmarks"),
    ],
)
def test_lines_that_are_wrong(two, text, words):
    with pytest.raises(ValueError, match=words):
        lines(two, text)
    assert not (two.parent / "out.rec").exists() and not (two.parent / "out.rec.partial").exists()


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(st.sampled_from('a/.jpg,"0123456789.enan-\\r\\n '), max_size=200).map(str.encode))
def test_any_bytes_are_landmarks_or_end_in_a_sentence(data):
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(data)
        file.flush()
        try:
            assert len(read_landmarks(file.name, "set"))
        except ValueError as error:
            assert file.name in str(error)


def test_a_file_that_is_not_there(two):
    with pytest.raises(ValueError, match=r"none\.csv cannot be read as CSV \(No such file"):
        pack(open_source(str(two)), str(two.parent / "out.rec"), PackConfig(landmarks=str(two.parent / "none.csv")))


def test_landmarks_are_those_of_the_upright_image(two):
    """A photo that its EXIF data turn by 90 degrees, and the same upright, give the same face."""
    upright = cv2.imdecode(np.frombuffer(picture(5, (40, 32)), np.uint8), cv2.IMREAD_COLOR)
    jpeg = cv2.imencode(".jpg", cv2.rotate(upright, cv2.ROTATE_90_COUNTERCLOCKWISE), [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    turned = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    (two / "person00" / "00.jpg").write_bytes(turned)
    (two / "person00" / "01.jpg").write_bytes(cv2.imencode(".jpg", upright, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes())
    lines(two, f"person00/00.jpg,{LINE}\nperson00/01.jpg,{LINE}\nperson01/00.jpg,{LINE}\n")
    source = open_source(str(two.parent / "out.rec"))
    first, second = (cv2.imdecode(np.frombuffer(source.read(at), np.uint8), cv2.IMREAD_COLOR).astype(int) for at in (0, 1))
    assert np.abs(first - second).mean() < 2


def test_resizing_keeps_what_has_the_size(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    files = {"0.jpg": picture(0, 24), "1.png": picture(1, 24, ".png"), "2.jpg": picture(2, (60, 90)), "3.bmp": picture(3, 24, ".bmp")}
    for name, data in (files | {"4.jpg": picture(4, 12)}).items():
        (tmp_path / "set" / "a" / name).write_bytes(data)
    pack(open_source(str(tmp_path / "set")), str(tmp_path / "out.rec"), PackConfig(resize=24, quality=100))
    source = open_source(str(tmp_path / "out.rec"))
    packed = [source.read(index) for index in range(5)]
    assert packed[0] == files["0.jpg"] and packed[1] == files["1.png"]
    for data in packed[2:]:
        assert data.startswith(b"\xff\xd8\xff")
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (24, 24, 3)
