"""Parquet sets, as Hugging Face datasets writes them: the same images and labels as a folder; what is missing or damaged is reported."""

import contextlib
import json
import pickle
import struct
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture

from dali_loaders import pack
from dali_loaders.account import ReadError
from dali_loaders.sources import FolderSource, RecordSource
from dali_loaders.sources.parquet import ParquetSource
from dali_loaders.sources.parquet_files import is_parquet, parquet_files
from dali_loaders.sources.parquet_footer import Chunk, DamagedFooterError, read_groups

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = [f"person{n:02}" for n in range(6)]


def images(numbers):
    return pa.array([{"bytes": picture(n), "path": f"{n}.jpg"} for n in numbers], STRUCT)


def described(table, names):
    """With the description of features that Hugging Face datasets leaves in the schema."""
    label = {"names": names, "_type": "ClassLabel"}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})})


def export(folder, shards=3, names=NAMES, name="train"):
    """The set of the fixture `folder`, 6 identities with 4 images each, in `shards` files of row groups of 3."""
    folder.mkdir(exist_ok=True)
    table = described(pa.table({"image": images(range(24)), "label": np.arange(24) // 4}), names)
    for shard in range(shards):
        part = table.slice(shard * 24 // shards, 24 // shards)
        pq.write_table(part, folder / f"{name}-{shard:05}-of-{shards:05}.parquet", row_group_size=3)
    return folder


def write(path, row_group_size=3, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def reasons(source):
    return {reason: passed.count for reason, passed in source.account.passed_over.items()}


def test_an_export_is_the_same_set_as_the_folder(folder, tmp_path):
    (export(tmp_path / "hub") / "README.md").write_text("card")
    a, b = FolderSource(str(folder)), ParquetSource(str(tmp_path / "hub"))
    assert a.identities == b.identities and a.labels.tolist() == b.labels.tolist() and b.labels.dtype == np.int64
    assert [a.read(index) for index in range(24)] == [b.read(index) for index in range(24)]
    assert b.name(9) == "train-00001-of-00003.parquet:row 1"
    assert (b.account.seen, b.account.used, reasons(b)) == (25, 24, {"no image by its name": 1})
    assert pickle.loads(pickle.dumps(b)).read(7) == picture(7)


def test_one_file_and_patterns(tmp_path, caplog):
    export(tmp_path), export(tmp_path, shards=1, name="test")
    assert len(ParquetSource(str(tmp_path / "train-*.parquet"))) == 24
    assert len(ParquetSource(str(tmp_path / "test-00000-of-00001.parquet"))) == 24 and not caplog.text
    assert len(ParquetSource(str(tmp_path / "train-00001-of-00003.parquet"))) == 8
    assert "is one file of 3; for all of them name their folder" in caplog.text


def test_splits_are_not_mixed(tmp_path):
    export(tmp_path), export(tmp_path, shards=1, name="test")
    with pytest.raises(ValueError, match=r"holds several sets: .*/test-\*\.parquet, .*/train-\*\.parquet"):
        ParquetSource(str(tmp_path))


@pytest.mark.parametrize("names", [("train.parquet", "test.parquet"), ("train/0000.parquet", "test/0000.parquet")])
def test_splits_by_other_names(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, image=images(range(3)), label=[0, 0, 1])
    with pytest.raises(ValueError, match="holds several sets"):
        ParquetSource(str(tmp_path))


def test_a_missing_shard(tmp_path):
    (export(tmp_path) / "train-00001-of-00003.parquet").unlink()
    for path in (tmp_path, tmp_path / "train-*"):
        with pytest.raises(ValueError, match=r"lacks (train-00001-of|1 of 3 files .*number 1; copy them too)"):
            ParquetSource(str(path))
    (tmp_path / "train-00000-of-00002.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="files of several exports"):
        ParquetSource(str(tmp_path))


def test_braces(tmp_path):
    export(tmp_path)
    source = ParquetSource(f"{tmp_path}/train-{{00000..00002}}-of-00003.parquet")
    assert source.labels.tolist() == ParquetSource(str(tmp_path)).labels.tolist()
    with pytest.raises(ValueError, match=r"1 of the 4 files .* are missing, the first is \S+train-00003"):
        ParquetSource(f"{tmp_path}/train-{{00000..00003}}-of-00003.parquet")


def test_what_is_parquet(tmp_path):
    assert is_parquet("a.parquet") and is_parquet("s/train-*.parquet#img:id") and not is_parquet("a.tar") and not is_parquet(str(tmp_path))
    (tmp_path / "data").mkdir()
    export(tmp_path / "data")
    assert is_parquet(str(tmp_path)) and is_parquet(str(tmp_path / "data")) and is_parquet(f"{tmp_path}#image:label")
    assert len(parquet_files(str(tmp_path), ParquetSource(str(tmp_path)).account)) == 3


def test_class_names_are_joined_over_files(tmp_path):
    """The number 1 is ben in one file and carl in the other."""
    for place, names in enumerate((["anna", "ben", "nobody"], ["ben", "carl"])):
        table = described(pa.table({"image": images([2 * place, 2 * place + 1]), "label": [0, 1]}), names)
        pq.write_table(table, tmp_path / f"{place}.parquet")
    source = ParquetSource(str(tmp_path))
    assert source.identities == ["anna", "ben", "carl"] and source.labels.tolist() == [0, 1, 1, 2]
    assert [source.read(index) for index in range(4)] == [picture(n) for n in range(4)]


@pytest.mark.parametrize(
    ("labels", "identities", "expected"),
    [
        (pa.array([700, 20, 700, 3], pa.int32()), ["3", "20", "700"], [2, 1, 2, 0]),
        (pa.array(["b", "ä", "b", "a"]), ["a", "b", "ä"], [1, 2, 1, 0]),
        (pa.array(["b", "ä", "b", "a"], pa.string_view()), ["a", "b", "ä"], [1, 2, 1, 0]),
        (pa.array(["b", "ä", "b", "a"]).dictionary_encode(), ["a", "b", "ä"], [1, 2, 1, 0]),
        (pa.array([2**64 - 1, 0, 0, 0], pa.uint64()), ["0", str(2**64 - 1)], [1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_kinds_of_columns(labels, identities, expected, kind, tmp_path):
    source = ParquetSource(
        write(tmp_path / "a.parquet", img=pa.array([picture(n) for n in range(4)], kind), identity=labels, width=[1, 2, 3, 4])
    )
    assert source.identities == identities and source.labels.tolist() == expected
    assert [source.read(index) for index in range(4)] == [picture(n) for n in range(4)]


def test_names_that_are_not_utf8(tmp_path):
    """GBK, as it comes from old folder names; it stays what it is."""
    raw = pa.array(["张".encode("gbk"), b"b"])
    path = write(tmp_path / "a.parquet", image=images([0, 1]), label=pa.StringArray.from_buffers(2, *raw.buffers()[1:]))
    assert ParquetSource(path).identities == ["b", "张".encode("gbk").decode(errors="surrogateescape")]


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_without_image_or_label_are_accounted_for(statistics, tmp_path):
    rows = [{"bytes": picture(0)}, None, {"bytes": None, "path": "a/1.jpg"}, {"bytes": picture(3)}, {"bytes": b""}, {"bytes": picture(5)}]
    table = described(pa.table({"image": pa.array(rows, STRUCT), "label": [1, 1, 1, -1, 0, None]}), ["anna", "ben"])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, write_statistics=statistics)
    source = ParquetSource(str(tmp_path / "a.parquet"))
    assert source.identities == ["anna", "ben"] and source.labels.tolist() == [1, 0]
    assert reasons(source) == {"null label": 1, "negative label": 1, "path of an image without its bytes": 1, "null image": 1}
    assert source.account.passed_over["null image"].examples == ["a.parquet:row 1"] and source.account.seen == 6
    assert source.read(0) == picture(0)
    with pytest.raises(ReadError, match=r"^empty$"):
        source.read(1)


def test_no_image_at_all(tmp_path):
    paths = pa.array([{"path": "a/1.jpg"}], STRUCT)
    with pytest.raises(ValueError, match=r"holds no labelled image: 1 seen, 0 used.*1 path of an image without its bytes"):
        ParquetSource(write(tmp_path / "a.parquet", image=paths, label=[0]))
    with pytest.raises(ValueError, match="holds no labelled image: 0 seen"):
        ParquetSource(write(tmp_path / "b.parquet", image=paths.slice(0, 0), label=pa.array([], pa.int64())))
    with pytest.raises(ValueError, match=r"holds no labelled image: 1 seen.*1 empty label"):
        ParquetSource(write(tmp_path / "b.parquet", image=images([0]), label=[""]))


def test_columns_that_are_not_clear(tmp_path):
    file = write(tmp_path / "a.parquet", photo_a=images([0]), photo_b=images([1]), age=[3], person_id=["x"], subject=[1])
    with pytest.raises(
        ValueError, match=r"columns photo_a, photo_b could all hold the images; .* photo_a \(struct<.*>\), .* age \(int64\)"
    ):
        ParquetSource(file)
    with pytest.raises(ValueError, match="column 'photo_c', named for the images, does not exist"):
        ParquetSource(f"{file}#photo_c:age")
    with pytest.raises(ValueError, match="column 'photo_a', named for the labels, is of type struct"):
        ParquetSource(f"{file}#photo_a:photo_a")
    with pytest.raises(ValueError, match="expected two columns after the #"):
        ParquetSource(f"{file}#photo_a")
    source = ParquetSource(f"{file}#photo_b:person_id")
    assert source.read(0) == picture(1) and source.identities == ["x"]


def test_no_column_fits(tmp_path):
    with pytest.raises(ValueError, match=r"no column is known to hold the labels; .*image \(.*\), age \(int64\)\."):
        ParquetSource(write(tmp_path / "a.parquet", image=images([0]), age=[3]))
    with pytest.raises(ValueError, match="no column is known to hold the images"):
        ParquetSource(write(tmp_path / "a.parquet", image=["a.jpg"], label=[3]))
    with pytest.raises(ValueError, match="columns label, identity could all hold the labels"):
        ParquetSource(write(tmp_path / "a.parquet", image=images([0]), label=[3], identity=[4]))


def test_the_column_of_classes_and_the_usual_name(tmp_path):
    """A column `id` gives way to a ClassLabel, and a ClassLabel to a column that is called identity."""
    table = described(pa.table({"image": images([0]), "id": [7], "label": [0]}), ["ben"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert ParquetSource(str(tmp_path / "a.parquet")).identities == ["ben"]
    text = table.schema.metadata[b"huggingface"].replace(b'"label"', b'"gender"')
    table = table.rename_columns(["image", "identity", "gender"]).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    assert ParquetSource(str(tmp_path / "a.parquet")).identities == ["7"]


def test_a_name_with_a_line_break(tmp_path):
    with pytest.raises(ValueError, match=r"the identity 'a\\nb' has a line break in its name"):
        ParquetSource(write(tmp_path / "a.parquet", image=images([0]), label=["a\nb"]))


def test_files_that_differ(tmp_path):
    write(tmp_path / "0.parquet", image=images([0]), label=[1])
    write(tmp_path / "1.parquet", image=images([0]), label=["1"])
    with pytest.raises(ValueError, match=r"1\.parquet has .* 'label' \(text\), but .*0\.parquet has .* \(whole numbers\)"):
        ParquetSource(str(tmp_path))
    pq.write_table(described(pa.table({"image": images([0]), "label": [1]}), ["a", "b"]), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet names the classes of its labels, but .*0\.parquet does not"):
        ParquetSource(str(tmp_path))


def test_names_that_do_not_fit_the_labels(tmp_path):
    pq.write_table(described(pa.table({"image": images([0]), "label": [2]}), ["a", "b"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'label' holds the label 2, but names of 2 classes"):
        ParquetSource(str(tmp_path / "a.parquet"))
    pq.write_table(described(pa.table({"image": images([0]), "label": [1]}), ["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="two classes of column 'label' have the same name"):
        ParquetSource(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": images([0]), "label": [1]}).replace_schema_metadata({"huggingface": "{"}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"description of its features .* cannot be read"):
        ParquetSource(str(tmp_path / "a.parquet"))


def test_a_file_that_is_cut_off_or_none(tmp_path):
    data = (export(tmp_path, shards=1) / "train-00000-of-00001.parquet").read_bytes()
    for left in (0, 4, 11, len(data) // 2, len(data) - 1):
        (tmp_path / "a.parquet").write_bytes(data[:left])
        with pytest.raises(ValueError, match=r"a\.parquet is cut off, damaged or no Parquet file .*copy it again"):
            ParquetSource(str(tmp_path / "a.parquet"))


def test_a_damaged_row_group_costs_its_own_images_only(tmp_path):
    path = export(tmp_path, shards=1) / "train-00000-of-00001.parquet"
    start = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    source = ParquetSource(str(path))
    for index in range(24):
        if index // 3 == 3:
            with pytest.raises(ReadError, match="damaged row group"):
                source.read(index)
        else:
            assert source.read(index) == picture(index)


def test_a_file_that_vanishes_or_changes_during_a_run(tmp_path):
    path = export(tmp_path, shards=1) / "train-00000-of-00001.parquet"
    source = ParquetSource(str(path))
    export(tmp_path, shards=1, names=[name.upper() for name in NAMES])
    with pytest.raises(ReadError, match="the file has changed since it was opened"):
        source.read(0)
    path.unlink()
    with pytest.raises(ReadError, match="no such file"):
        source.read(0)


def test_row_groups_are_kept_within_bounds_and_decoded_once_for_all_threads(tmp_path, monkeypatch):
    source = ParquetSource(str(export(tmp_path)))
    group = source._groups._column(0).nbytes
    monkeypatch.setattr("dali_loaders.sources.parquet._KEPT_BYTES", 2 * group + group // 2)
    decoded, decode = [], type(source._groups.files[0]).images
    monkeypatch.setattr(type(source._groups.files[0]), "images", lambda *arguments: decoded.append(1) or decode(*arguments))
    order = np.random.default_rng(0).integers(0, 24, 200).tolist()
    wrong = []
    threads = [threading.Thread(target=lambda: wrong.extend(i for i in order if source.read(i) != picture(i))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(source._groups._kept) <= 2
    decoded.clear()
    assert [source.read(index) for index in range(24)] == [picture(index) for index in range(24)]
    assert len(decoded) <= 9


def test_large_row_groups_are_named(tmp_path, caplog):
    big = [bytes(33 << 20), b"x" + bytes(33 << 20)]
    ParquetSource(write(tmp_path / "a.parquet", image=pa.array(big, pa.binary()), label=[0, 0]))
    assert "row groups of up to" in caplog.text and "protoshard data pack" in caplog.text


def _mutated(data, cuts):
    """`data` with some of its bytes changed, or a piece cut out."""
    data = bytearray(data)
    for at, value in cuts:
        at %= len(data)
        if value < 256:
            data[at] = value
        else:
            del data[at : at + value - 255]
    return bytes(data)


def _open_and_read(path):
    try:
        source = ParquetSource(path)
    except ValueError as error:
        assert path in str(error)
        return
    assert source.account.used == len(source) == len(source.labels) and source.labels.max() < len(source.identities)
    assert source.account.seen == pq.read_metadata(path).num_rows
    for index in range(len(source)):
        with contextlib.suppress(ReadError):
            assert source.read(index)


_CUTS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 300)), min_size=1, max_size=4)


@pytest.fixture(scope="module", params=["snappy", "none", "zstd"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    table = described(pa.table({"image": images(range(6)), "label": [0, 1, 1, -1, None, 0]}), ["anna", "ben"])
    pq.write_table(table, folder / "a.parquet", row_group_size=3, compression=request.param)
    return folder, (folder / "a.parquet").read_bytes()


def _fuzz(exported, examples, where):
    folder, data = exported
    path = folder / "mutated.parquet"

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(_CUTS)
    def one(cuts):
        at = len(data) - where
        path.write_bytes(data[:at] + _mutated(data[at:], cuts))
        _open_and_read(str(path))

    one()


@pytest.mark.parametrize("where", ["footer", "anywhere"])
def test_mutated_files(exported, where):
    _fuzz(exported, 60, 3000 if where == "footer" else len(exported[1]))


@pytest.mark.long
@pytest.mark.parametrize("where", ["footer", "anywhere"])
def test_ten_thousand_mutated_files(exported, where):
    _fuzz(exported, 1700, 3000 if where == "footer" else len(exported[1]))


@pytest.mark.long
@pytest.mark.parametrize("rows", [100, 1000, 10_000])
def test_speed(rows, tmp_path, monkeypatch):
    """The figures of docs/data.md: images of 7 KB a second, in random order and in that of the file, from a set too large to be kept."""
    monkeypatch.setattr("dali_loaders.sources.parquet._KEPT_BYTES", 1)
    rng = np.random.default_rng(0)
    data = pa.array([{"bytes": rng.bytes(7000)} for _ in range(20_000)], STRUCT)
    source = ParquetSource(write(tmp_path / "a.parquet", rows, image=data, label=np.arange(20_000) // 20))
    pack(source, str(tmp_path / "a.rec"))
    record = RecordSource(str(tmp_path / "a.rec"))
    shuffled = rng.permutation(20_000).tolist()
    rates = [_rate(source, shuffled[: 200_000 // rows]), _rate(source, range(20_000)), _rate(record, shuffled)]
    print(f"\nrow groups of {rows}: {rates[0]:.0f} shuffled, {rates[1]:.0f} in order; RecordIO shuffled {rates[2]:.0f} images/s")
    assert rates[1] > rates[0] * 10


def _rate(source, indices):
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        for index in indices:
            source.read(index)
        best = max(best, len(indices) / (time.perf_counter() - start))
    return best


def test_the_footer_is_read_as_pyarrow_reads_it(exported):
    folder, _ = exported
    metadata = pq.read_metadata(folder / "a.parquet")
    groups = read_groups(str(folder / "a.parquet"))
    assert len(groups) == metadata.num_row_groups == 2
    for number, group in enumerate(groups):
        theirs = metadata.row_group(number)
        columns = [theirs.column(at) for at in range(theirs.num_columns)]
        assert group.rows == theirs.num_rows
        assert group.chunks == {
            column.path_in_schema: Chunk(column.num_values, column.total_uncompressed_size, column.statistics.null_count)
            for column in columns
        }


@given(st.binary(max_size=200))
def test_any_footer_ends_in_a_sentence(tmp_path_factory, footer):
    path = tmp_path_factory.mktemp("footer") / "a.parquet"
    path.write_bytes(footer + struct.pack("<I4s", len(footer), b"PAR1"))
    with contextlib.suppress(DamagedFooterError):
        read_groups(str(path))
