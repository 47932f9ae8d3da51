"""RecordIO against the mxnet package itself, byte for byte; damaged files end in a sentence."""

import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dali_loaders.recordio import index as record_index
from dali_loaders.recordio.headers import EMPTY, IMAGE
from dali_loaders.recordio.index import IndexedRecordReader, scan
from dali_loaders.recordio.mxnet_reader import MXNetReader, import_recordio
from dali_loaders.recordio.records import MAGIC, IRHeader, RandomAccessFile, RecordWriter, index_path, pack_record, unpack_record

MAGIC_BYTES = struct.pack("<I", MAGIC)
# Pieces that put the magic number at every place, aligned or not, alone, at the ends and in a row.
payloads = st.lists(st.one_of(st.just(MAGIC_BYTES), st.binary(max_size=9), st.just(b"1234")), min_size=1, max_size=8).map(b"".join)
payload_lists = st.lists(payloads, min_size=1, max_size=5)
some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def recordio():
    try:
        return import_recordio()
    except ValueError as error:
        pytest.skip(f"byte equality with MXNet is not tested: {error}")


def write(path: Path, payloads: list[bytes]) -> str:
    with RecordWriter(str(path)) as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, payload)
    return str(path)


@some
@given(payload_lists)
def test_what_is_written_is_read(tmp_path, payloads):
    path = write(tmp_path / "a.rec", payloads)
    reader = IndexedRecordReader(path)
    assert [reader.read(key) for key in range(len(payloads))] == payloads
    Path(index_path(path)).unlink()
    rebuilt = IndexedRecordReader(path)
    assert np.array_equal(rebuilt.offsets, reader.offsets)


@some
@given(payload_lists)
def test_files_equal_those_of_mxnet(recordio, tmp_path, payloads):
    ours, theirs = tmp_path / "ours.rec", tmp_path / "theirs.rec"
    write(ours, payloads)
    writer = recordio.MXIndexedRecordIO(index_path(str(theirs)), str(theirs), "w")
    for key, payload in enumerate(payloads):
        writer.write_idx(key, payload)
    writer.close()
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.with_suffix(".idx").read_bytes() == theirs.with_suffix(".idx").read_bytes()
    by_mxnet = recordio.MXIndexedRecordIO(index_path(str(ours)), str(ours), "r")
    by_us = IndexedRecordReader(str(theirs))
    for key, payload in enumerate(payloads):
        assert by_us.read(key) == payload
        if payload:  # mxnet cannot tell an empty record from the end of the file
            assert by_mxnet.read_idx(key) == payload
    by_mxnet.close()


@some
@given(
    st.one_of(st.integers(0, 2**24).map(float), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5)),
    st.integers(0, 2**64 - 1),
    payloads,
)
def test_headers_equal_those_of_mxnet(recordio, label, id_, payload):
    packed = pack_record(IRHeader(0, label if isinstance(label, float) else np.array(label), id_, 7), payload)
    assert packed == recordio.pack(recordio.IRHeader(0, label, id_, 7), payload)
    ours, theirs = unpack_record(packed), recordio.unpack(packed)
    assert ours[1] == theirs[1] == payload
    assert np.array_equal(ours[0].label, theirs[0].label)
    assert (ours[0].flag, ours[0].id, ours[0].id2) == (theirs[0].flag, theirs[0].id, theirs[0].id2)


def test_reading_through_mxnet(recordio, tmp_path):
    path = write(tmp_path / "a.rec", [b"one", MAGIC_BYTES * 3])
    reader = pickle.loads(pickle.dumps(MXNetReader(path)))
    assert reader.read(1) == MAGIC_BYTES * 3


def test_mxnet_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "mxnet", None)
    with pytest.raises(ValueError, match="needs the mxnet package"):
        MXNetReader(write(tmp_path / "a.rec", [b"one"]))
    assert vars(np).get("bool") in (None, np.bool_)  # the shim does not stay behind


def test_header_scan_finds_labels_and_images(tmp_path):
    headers = [IRHeader(0, 3.0, 1, 0), IRHeader(2, np.array([9, 1]), 2, 0), IRHeader(2, np.array([5, 6]), 3, 0), IRHeader(0, 4.0, 4, 0)]
    bodies = [b"image", b"", b"image of a labelled pair", MAGIC_BYTES * 4]
    path = write(tmp_path / "a.rec", [pack_record(h, b) for h, b in zip(headers, bodies, strict=True)])
    (piece,) = scan(RandomAccessFile(path))
    assert piece.headers.labels.tolist() == [3, 9, 5, 4]
    assert piece.headers.seconds.tolist() == [0, 1, 6, 0]
    assert piece.headers.states.tolist() == [IMAGE, EMPTY, IMAGE, IMAGE]
    assert piece.headers.ids.tolist() == [1, 2, 3, 4]


def test_large_records_and_sparse_keys(tmp_path):
    bodies = {7: bytes(100_000), 3: b"x" * 70_001, 900: b""}
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        for key, body in bodies.items():
            writer.write(key, body)
    reader = IndexedRecordReader(str(tmp_path / "a.rec"))
    assert reader.keys.tolist() == [7, 3, 900]
    assert all(reader.read(key) == body for key, body in bodies.items())
    with pytest.raises(ValueError, match="has no record 8"):
        reader.read(8)


def test_pickled_readers_and_threads_read_the_same(tmp_path):
    bodies = [bytes([n]) * (n * 37) for n in range(200)]
    reader = pickle.loads(pickle.dumps(IndexedRecordReader(write(tmp_path / "a.rec", bodies))))
    wrong = []

    def work(seed):
        for key in np.random.default_rng(seed).integers(0, 200, 500):
            if reader.read(int(key)) != bodies[key]:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), RecordWriter(str(tmp_path / "a.rec")) as writer:
        writer.write(0, b"one")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_missing_index_is_rebuilt_and_said(tmp_path, caplog):
    path = write(tmp_path / "a.rec", [b"one", b"two"])
    index = Path(index_path(path))
    before = index.read_bytes()
    index.unlink()
    assert IndexedRecordReader(path).read(1) == b"two"
    assert "was missing and has been rebuilt" in caplog.text
    assert index.read_bytes() == before


def test_missing_index_in_a_read_only_folder_is_scanned_in_memory(tmp_path, caplog, monkeypatch):
    path = write(tmp_path / "a.rec", [b"one", b"two"])
    Path(index_path(path)).unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record_index.os, "replace", refuse)
    assert IndexedRecordReader(path).read(1) == b"two"
    assert "cannot be written" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["a.rec"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("0\t0\n1\t99999\n", "record 1 lies beyond the end"),
        ("0\t0\n1\t4\n", "no record starts at byte 4"),
        ("0\t0\n1\n", "is not an index"),
        ("zero\tone\n", "is not an index"),
        ("", "covers 0 of 80 bytes"),
    ],
)
def test_an_index_that_does_not_match(tmp_path, index, message):
    path = write(tmp_path / "a.rec", [b"one" * 10, b"two" * 10])
    Path(index_path(path)).write_text(index)
    with pytest.raises(ValueError, match=message):
        IndexedRecordReader(path)


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("cut", [3, 30, 39, 45])
def test_a_cut_off_record_file(tmp_path, with_index, cut):
    path = write(tmp_path / "a.rec", [b"one" * 10, b"two" * 10])
    Path(path).write_bytes(Path(path).read_bytes()[:-cut])
    if not with_index:
        Path(index_path(path)).unlink()
    with pytest.raises(ValueError, match=r"cut off|beyond the end|no record starts"):
        IndexedRecordReader(path)


def test_cut_off_between_the_parts_of_a_record(tmp_path):
    path = write(tmp_path / "a.rec", [b"1234" + MAGIC_BYTES + b"5678"])
    Path(path).write_bytes(Path(path).read_bytes()[:12])
    Path(index_path(path)).unlink()
    with pytest.raises(ValueError, match="is cut off"):
        IndexedRecordReader(path)


def test_other_files_are_not_taken_for_records(tmp_path):
    (tmp_path / "a.rec").write_bytes(b"this is text, not records")
    with pytest.raises(ValueError, match="is not a RecordIO file"):
        IndexedRecordReader(str(tmp_path / "a.rec"))
    (tmp_path / "empty.rec").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no records"):
        IndexedRecordReader(str(tmp_path / "empty.rec"))
    with pytest.raises(ValueError, match=r"cannot open .*none\.rec"):
        IndexedRecordReader(str(tmp_path / "none.rec"))


def test_records_too_short_for_their_header():
    with pytest.raises(ValueError, match="too short for an image record header"):
        unpack_record(b"short")
    with pytest.raises(ValueError, match="too short for the 5 label numbers"):
        unpack_record(struct.pack("<IfQQ", 5, 0, 0, 0))
