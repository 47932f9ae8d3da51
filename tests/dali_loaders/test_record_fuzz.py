"""A .rec, its .idx and its identities file, changed at random: refused in a sentence, or every image used with its own label, or accounted
for. Only what is written into the bytes of an image itself cannot be noticed (or a length that changes within the padding to 4 bytes), and
without an identities file its own label."""

import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_sets import offsets_of, write_set

from dali_loaders.recordio.records import MAGIC
from dali_loaders.sources import RecordSource

MAGIC_BYTES = MAGIC.to_bytes(4, "little")
LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2]
IMAGES = [bytes([65 + n]) * (5 + 3 * n) for n in range(8)] + [b"12345678" + MAGIC_BYTES + b"abc" + MAGIC_BYTES * 2]
NAMES = ["anna", "ben\nor not", "clara"]
SUFFIXES = (".rec", ".idx", ".identities.txt")


@pytest.fixture(scope="module", params=[True, False], ids=["named", "unnamed"])
def originals(request, tmp_path_factory) -> dict[str, bytes]:
    path = Path(write_set(tmp_path_factory.mktemp("fuzz") / "a.rec", LABELS, IMAGES, NAMES if request.param else None, zero_last=True))
    found = {suffix: path.with_suffix(suffix) for suffix in SUFFIXES}
    return {suffix: file.read_bytes() for suffix, file in found.items() if file.exists()} | {"offsets": offsets_of(str(path))}


@pytest.fixture(autouse=True)
def quiet_log():
    """Every .idx that is rebuilt is said."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@st.composite
def changes(draw, data: bytes) -> tuple[bytes, set[int]]:
    """Changed bytes, and which places of the old ones were overwritten (all, where others moved)."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "insert", "remove", "repeat", "lines", "swap", "ends"]))
    at = draw(st.integers(0, len(data) - 1))
    size = draw(st.sampled_from([1, 2, 4, 8, 28, 40]))
    if kind == "cut":
        return data[:at], set()
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :], {at}
    if kind == "insert":
        return data[:at] + draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(MAGIC_BYTES))) + data[at:], set()
    if kind == "remove":
        return data[:at] + data[at + size :], set()
    if kind == "repeat":
        return data[:at] + data[at : at + size] * 2 + data[at + size :], set()
    if kind == "swap":
        other = draw(st.integers(0, len(data) - 1))
        first, second = sorted((at, other))
        size = min(size, second - first, len(data) - second)
        swapped = (
            data[:first] + data[second : second + size] + data[first + size : second] + data[first : first + size] + data[second + size :]
        )
        return swapped, {*range(first, first + size), *range(second, second + size)}
    lines = data.split(b"\n")
    if kind == "ends":
        return draw(st.sampled_from([b"\r\n".join(lines), b"\xef\xbb\xbf" + data, data + b"\n", data + b"\0", data * 2])), set()
    return b"\n".join(draw(st.permutations(lines)) if len(lines) < 40 and draw(st.booleans()) else lines[: at % len(lines)]), set()


def check(originals: dict, data) -> None:
    files = {suffix: content for suffix, content in originals.items() if suffix in SUFFIXES}
    touched: set[int] = set()
    # Whole records that a .rec and its .idx have lost both are missed by record 0 or an identities file alone.
    named = ".identities.txt" in files
    for suffix in data.draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=1 + named, unique=True)):
        files[suffix], places = data.draw(changes(files[suffix]))
        if suffix == ".rec":
            touched = places
    if (named or files[".rec"] == originals[".rec"]) and data.draw(st.sampled_from([False, False, True])):
        del files[".idx"]
    offsets, whole = originals["offsets"], len(originals[".rec"])
    ends = dict(zip(sorted(offsets.values()), [*sorted(offsets.values())[1:], whole], strict=True))
    # Of a record that was written into: its own image; and its label, where there is no other witness of it.
    if named and files[".identities.txt"] != originals[".identities.txt"] and touched & {*range(offsets[0] + 24, offsets[0] + 32)}:
        return  # other names, and their checksum in record 0 is gone
    label = range(12, 12 if named else 16)
    mine = {key: {start + 4, *(start + at for at in label), *range(start + 32, ends[start])} for key, start in offsets.items()}
    mine[0] |= {*range(offsets[0] + 8, offsets[0] + 12)} if not named else set()  # without its flag it is an image, of 8 bytes
    excused = {key for key, places in mine.items() if touched & places}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, content in files.items():
            Path(folder, f"a{suffix}").write_bytes(content)
        try:
            source = RecordSource(f"{folder}/a.rec")
        except ValueError as error:
            assert folder in str(error) and str(error).endswith(".") and "\n" not in str(error)
            return
        account = source.account
        assert account.seen == account.used + sum(passed.count for passed in account.passed_over.values())
        assert account.used == len(source) == len(source.labels) and account.seen >= len(IMAGES)
        images = [source.read(index) for index in range(len(source))]
        assert [bytes(image) for image in source.read_many(source.labels * 0 + range(len(source)))] == images
    names = NAMES if named else ["0", "1", "2"]
    right = {(image, names[label]) for image, label in zip(IMAGES, LABELS, strict=True)}
    found = [(image, source.identities[label]) for image, label in zip(images, source.labels.tolist(), strict=True)]
    assert len(set(found) - right) <= len(excused)
    assert len(right - set(found)) <= len(excused) + account.seen - account.used


quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=200, deadline=None, suppress_health_check=quiet)
@given(st.data())
def test_changed_files(originals, data):
    check(originals, data)


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(max_examples=10_000, deadline=None, suppress_health_check=quiet)
@given(st.data())
def test_changed_files_at_length(originals, data):
    check(originals, data)
