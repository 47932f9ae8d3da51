"""Reading pair sets as every Python and numpy wrote them, and refusing whatever else a pickle can hold."""

import collections
import os
import pickle
import random

import numpy as np
import pytest

from pipeline.evaluation.pair_pickle import load_pairs

IMAGES = [b"\x00\xff\x80 first", b"second", b"", b"fourth"]
# (["\x00\xff", array([1, 255], uint8), array([[7]], uint8), "z"], [True, numpy.bool_(False)]) as Python 2 writes it, protocol 2.
PYTHON_2 = (
    b"\x80\x02]q\x00(U\x02\x00\xffq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07"
    b"(K\x01K\x02\x85q\x08cnumpy\ndtype\nq\tU\x02u1q\nK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89"
    b"U\x02\x01\xffq\x0ftq\x10bh\x02h\x03K\x00\x85h\x05\x87R(K\x01K\x01K\x01\x86h\x0c\x89U\x01\x07tbU\x01ze](\x88cnumpy.core.multiarray\nscalar\n"
    b"h\tU\x02b1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x01\x00\x86Re\x86."
)


@pytest.fixture
def write(tmp_path):
    def write(content: object, protocol: int = 4) -> str:
        path = tmp_path / "set.bin"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return str(path)

    return write


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "array", "column"])
def test_images_in_every_protocol(write, protocol, kind):
    images = {
        "bytes": IMAGES,
        "bytearray": [bytearray(image) for image in IMAGES],
        "array": [np.frombuffer(image, np.uint8) for image in IMAGES],
        "column": [np.frombuffer(image, np.uint8).reshape(-1, 1).copy() for image in IMAGES],
    }[kind]
    assert load_pairs(write((images, [True, False]), protocol)) == (IMAGES, [True, False])


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("issame", [[1, 0], (True, False), [np.True_, np.False_], np.array([True, False]), np.array([1, 0])])
def test_labels_in_every_spelling(write, protocol, issame):
    assert load_pairs(write((IMAGES, issame), protocol)) == (IMAGES, [True, False])


def test_python_2(write):
    assert load_pairs(write(PYTHON_2)) == ([b"\x00\xff", b"\x01\xff", b"\x07", b"z"], [True, False])


def test_newer_numpy_spells_its_module_differently(write):
    content = pickle.dumps(([np.array([1, 2], np.uint8)], [np.True_]), 2)
    renamed = content.replace(b"numpy.core.multiarray", b"numpy._core.multiarray")
    assert renamed != content or b"numpy._core" in content
    assert load_pairs(write(renamed)) == ([b"\x01\x02"], [True])


class Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (([b"a", Attack()], [True]), r"posix\.system"),
        (([b"a", collections.OrderedDict()], [True]), r"collections\.OrderedDict"),
        (([b"a", random.Random(0)], [True]), r"random\.Random"),
        (b"\x80\x04cbuiltins\neval\n(Vprint(1)\ntR.", r"builtins\.eval"),
        (b"\x80\x04cnumpy\nload\n(Vx\ntR.", r"numpy\.load"),
        (([b"a", np.array([None, 1])], [True]), "numpy array of type 'O8'"),
        (([b"a", np.zeros(2, ">i4")], [True]), "big-endian"),
    ],
)
def test_other_classes_are_refused_by_name_and_never_run(write, content, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"set.bin: it cannot be read .*{named}.*; expected a pickle of"):
        load_pairs(write(content, 2))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2, 3], "something other than two lists"),
        ({"images": []}, "something other than two lists"),
        ((IMAGES, 7), "something other than two lists"),
        ((np.zeros(4, np.uint8), [True]), "the images are one array"),
        (([b"a", "text"], [True]), "image 1 is a str"),
        (([b"a", np.zeros(2, np.int64)], [True]), "image 1 is a"),
        (([b"a", b"b"], [2]), "label of pair 0 is 2"),
        (([b"a", b"b"], ["yes"]), "label of pair 0 is 'yes'"),
    ],
)
def test_other_contents_end_in_a_sentence(write, content, sentence):
    with pytest.raises(ValueError, match=f"set.bin: .*{sentence}.*expected a pickle of"):
        load_pairs(write(content))


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps((IMAGES, [True]))[:-9], b"\x80\x04\x8c\xff", b"cnumpy\nndarray\n)R."])
def test_damaged_files_end_in_a_sentence(write, content):
    with pytest.raises(ValueError, match=r"set.bin: .*expected a pickle of"):
        load_pairs(write(content))


def test_missing_file_ends_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"none.bin: the pair set cannot be opened \(No such file"):
        load_pairs(str(tmp_path / "none.bin"))


def test_every_single_damaged_byte_is_read_or_refused_in_a_sentence(write):
    """Flips each byte of a small file: never another exception than ValueError."""
    good = pickle.dumps(([np.array([1, 2], np.uint8), b"b"], [True]), 2)
    for i in range(len(good)):
        try:
            load_pairs(write(good[:i] + bytes([good[i] ^ 0x15]) + good[i + 1 :]))
        except ValueError as error:
            assert "set.bin" in str(error)
