"""A packed set is read by us, by the mxnet package, and by the index arithmetic that InsightFace's readers use."""

import os

import numpy as np
import pytest
from pictures import picture

from dali_loaders import open_source, pack
from dali_loaders.identities import checksum, identities_path
from dali_loaders.packing import PackConfig
from dali_loaders.recordio import records
from dali_loaders.recordio.mxnet_reader import import_recordio


@pytest.fixture
def packed(folder):
    path = str(folder.with_suffix(".rec"))
    pack(open_source(str(folder)), path)
    return path


def test_layout_is_that_of_insightface(packed):
    try:
        recordio = import_recordio()
    except ValueError as error:
        pytest.skip(f"the layout is not read through MXNet: {error}")
    file = recordio.MXIndexedRecordIO(records.index_path(packed), packed, "r")
    header, payload = recordio.unpack(file.read_idx(0))
    first_identity, end = (int(number) for number in header.label)
    assert (header.flag, payload, first_identity, end) == (2, b"", 25, 31)
    for label, key in enumerate(range(first_identity, end)):
        header, payload = recordio.unpack(file.read_idx(key))
        assert payload == b""
        for image in range(int(header.label[0]), int(header.label[1])):
            image_header, data = recordio.unpack(file.read_idx(image))
            assert image_header.label == label
            assert data == picture(image - 1)


@pytest.mark.parametrize("reader", ["native", "mxnet"])
@pytest.mark.parametrize("with_names", [True, False])
def test_read_back(packed, reader, with_names, tmp_path):
    if reader == "mxnet":
        try:
            import_recordio()
        except ValueError as error:
            pytest.skip(str(error))
    if not with_names:
        (tmp_path / "set.identities.txt").unlink()
    source = open_source(packed, reader)
    assert len(source) == 24
    assert source.labels.tolist() == np.repeat(np.arange(6), 4).tolist()
    assert source.identities == [f"person{n:02}" if with_names else str(n) for n in range(6)]
    assert [source.read(index) for index in range(24)] == [picture(index) for index in range(24)]


def test_packing_a_packed_set_changes_nothing(packed, tmp_path):
    again = str(tmp_path / "again.rec")
    pack(open_source(packed), again)
    for path in (lambda p: p, records.index_path, identities_path):
        with open(path(packed), "rb") as a, open(path(again), "rb") as b:
            assert a.read() == b.read()


def test_names_that_do_not_match(packed, tmp_path):
    names = tmp_path / "set.identities.txt"
    names.write_text("5\tanna\n2\tben\n")
    with pytest.raises(ValueError, match=r"set\.identities\.txt does not match"):
        open_source(packed)
    names.write_text("anna\nben\n")
    with pytest.raises(ValueError, match="does not hold lines"):
        open_source(packed)


def test_names_in_any_encoding(tmp_path):
    """The same names, and so the same checksum, whatever the form."""
    for name in (b"\xd5\xc5\xc8\xfd", b"anna", "Zoë".encode(), b"two\nlines"):
        (tmp_path / "set" / os.fsdecode(name)).mkdir(parents=True)
        (tmp_path / "set" / os.fsdecode(name) / "0.jpg").write_bytes(picture(1))
    folder = open_source(str(tmp_path / "set"))
    for out in ("out.rec", "out.tar"):
        opened_by = pack(folder, str(tmp_path / out), PackConfig(verify=True)).out
        assert checksum(open_source(opened_by).identities) == checksum(folder.identities)


def test_bad_targets(folder, tmp_path):
    source = open_source(str(folder))
    with pytest.raises(ValueError, match=r"give it a name that ends in \.rec"):
        pack(source, str(tmp_path / "out.bin"))
    with pytest.raises(ValueError, match="choose a folder with room that exists"):
        pack(source, str(tmp_path / "none" / "out.rec"))
    (tmp_path / "folder.rec").mkdir()
    with pytest.raises(ValueError, match=r"folder\.rec is a folder"):
        pack(source, str(tmp_path / "folder.rec"))
    pack(source, str(tmp_path / "out.rec"))
    pack(source, str(tmp_path / "other.rec"))
    for read in ("{0}/out.rec", "{0}/other.rec,{0}/out.rec", "{0}/o*.rec", "{0}/{{other,out}}.rec"):
        read = read.format(tmp_path)
        with pytest.raises(ValueError, match="is the set that is read, or a part of it"):
            pack(open_source(read), str(tmp_path / "out.rec"))
