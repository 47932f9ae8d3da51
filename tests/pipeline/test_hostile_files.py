"""Files of strangers: each kind, made to run code, to take memory or to write elsewhere, ends in a sentence, and nothing has happened."""

import copy
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from dali_loaders.fetching import fetch
from dali_loaders.names import printable
from dali_loaders.remote import without_secrets
from pipeline import checkpoint
from pipeline.cli import main
from pipeline.config import TrainConfig, as_dict, as_text, from_dict
from pipeline.distributed import describe, join
from pipeline.evaluation.pair_lists import PairList, find_images
from pipeline.evaluation.set_names import file_name
from pipeline.interop.insightface import import_config
from pipeline.interop.recipe_file import recipe_source
from pipeline.interop.weights import fit, read_weights
from pipeline.local_ranks import run_local
from pipeline.resolve import resolve

fsspec = pytest.importorskip("fsspec")


class Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The folder of a test, in which no attack may leave its mark."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("pwned*"))


# Weights


def archive(path: Path, pickled: bytes | None = None, rename: str = "", compression: int = zipfile.ZIP_STORED) -> None:
    """A file of torch.save with another pickle, names or compression."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    with zipfile.ZipFile(buffer) as given, zipfile.ZipFile(path, "w", compression) as out:
        for entry in given.infolist():
            changed = pickled is not None and entry.filename.endswith("data.pkl")
            out.writestr(rename + entry.filename, pickled if changed and pickled is not None else given.read(entry))


def old_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            entry, data = tarfile.TarInfo(f"../{name}"), pickle.dumps(Attack())
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def lying_storage(path: Path) -> None:
    archive(path)
    with zipfile.ZipFile(path) as given:
        pickled = given.read(next(name for name in given.namelist() if name.endswith("data.pkl")))
    archive(path, pickled.replace(b"K\x03tq", b"J\xff\xff\xff\x3ftq", 1))


NESTED = b"\x85" * 200_000
LAUGHS = b")q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
SPARSE = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (1 << 20, 1 << 20), check_invariants=True)
WEIGHTS = {
    "code in a zip": (lambda path: torch.save({"a": Attack()}, path), "not a file of weights"),
    "code in the older format": (
        lambda path: torch.save({"a": Attack()}, path, _use_new_zipfile_serialization=False),
        "not a file of weights",
    ),
    "code in a bare pickle": (lambda path: path.write_bytes(pickle.dumps(Attack())), "not a file of weights"),
    "code in the oldest format": (old_tar, "not a file of weights"),
    "TorchScript": (script, "not a file of weights"),
    "names that lead elsewhere": (lambda path: archive(path, rename="../../pwned/"), "not a file of weights"),
    "a storage larger than its file": (lying_storage, "not a file of weights"),
    "zeros compressed": (
        lambda path: archive(path, bytes(100 << 20), compression=zipfile.ZIP_DEFLATED),
        r"claims to hold 104,\d*,\d* bytes in",
    ),
    "an array of any size": (lambda path: archive(path, b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."), "arrays of any size"),
    "deep values": (lambda path: archive(path, b")" + NESTED + b"."), "nests values too deep"),
    "a deep key": (lambda path: archive(path, b"})" + NESTED + b"K\x01s."), "nests values too deep"),  # the process would end
    "a key without end": (lambda path: archive(path, b"}(" + LAUGHS + b"K\x01u."), "repeats values too often"),
    "a wrapper in itself": (lambda path: archive(path, b"}q\x00X\x05\x00\x00\x00modelh\x00s."), "holds no state dict: there is model"),
    "names with escape sequences": (lambda path: torch.save({"\x1b[2J\n": 1}, path), r"there is \\x1b\[2J\\n, but"),
    "a tensor without numbers": (lambda path: torch.save({"a": torch.empty(9, device="meta")}, path), r"a \(9,\) has no numbers"),
    "an expanded tensor": (lambda path: torch.save({"a": torch.zeros(1).expand(1 << 40)}, path), "has far fewer numbers in the file"),
    "a sparse tensor": (lambda path: torch.save({"a": SPARSE}, path), "has far fewer numbers in the file"),
    "a pipe": (os.mkfifo, "it is no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is no regular file"),
    "a folder": (os.mkdir, "it is a directory"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_files(name, here):
    make, reason = WEIGHTS[name]
    make(here / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt .*{reason}|cannot read .*a\.pt: {reason}") as caught:
        fit(read_weights("a.pt"), {"a": torch.zeros(3)}, "a.pt", "a network")
    assert str(caught.value).isprintable()


def test_what_is_expanded_or_sparse_and_small_is_read(here):
    torch.save({"a": torch.ones(1).expand(3), "b": torch.ones(2).to_sparse()}, "a.pt")
    torch.testing.assert_close(read_weights("a.pt"), {"a": torch.ones(3), "b": torch.ones(2)})


def test_safetensors_that_lie(here):
    whole = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    faults: list[dict[str, object]] = [
        {"shape": [2**62, 4]}, {"shape": [2**40], "data_offsets": [0, 2**42]}, {"shape": [-4]}, {"data_offsets": [16, 0]}, {"dtype": "Q"},
    ]  # fmt: skip
    headers = [json.dumps({"a": whole["a"] | fault}).encode() for fault in faults] + [b"[]", b'{"a":' + b"[" * 10**5]
    files = [struct.pack("<Q", len(header)) + header + bytes(16) for header in headers]
    files += [struct.pack("<Q", size) + json.dumps(whole).encode() + bytes(16) for size in (2**31, 2**63)]
    for content in files:
        (here / "a.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.safetensors is not a whole \.safetensors file"):
            read_weights("a.safetensors")


# Configurations

CONFIG = "config = edict()\nconfig.network = 'mbf'\nconfig.rec = 'x'\nconfig.num_epoch = 2\nconfig.margin_list = (1.0, 0.5, 0.0)\n"
LISTS = "a = [1]\n" + "a = [a, a]\n" * 60
CONFIGS = {
    "a decorator": ("@__import__('os').system('touch pwned')\ndef f(): pass\n", None),
    "a default": ("def f(x=__import__('os').system('touch pwned')): pass\n", None),
    "a base class": ("class X(__import__('os').system('touch pwned') or object): pass\n", None),
    "an option's name that ends the docstring": ('config["\\"\\"\\"\\nimport os; os.system(\'touch pwned\')\\n\\"\\"\\""] = 1\n', None),
    "an option's name of surrogates": ('config["\\ud800"] = 1\n', None),
    "a number as an option's name": ("config[5] = 1\n", None),
    "options in themselves": ("config.a = config\n", None),
    "lists that multiply": (LISTS + "config.rec = str(a)\n", "cannot read"),
    "lists that multiply, compared": (LISTS + LISTS.replace("a", "b") + "config.num_epoch = 1 if a == b else 2\n", "cannot read"),
    "deep signs": (f"config.lr = {'-' * 40_000}1\n", "not a Python file"),
    "deep attributes": (f"config.lr = a{'.b' * 40_000}\n", "not a Python file"),
    "deep sums": (f"config.lr = 1{'+1' * 40_000}\n", "not a Python file"),
    "imports from above the root": (f"from {'.' * 60}a import *\n", "cannot read"),
    "a secret of this machine": ("import os\nconfig.rec = os.environ['MY_TOKEN']\n", "the variable MY_TOKEN may be a secret"),
    "a large file": ("#" * 200_000, "more than 100,000 bytes"),
    "a zero byte": ("\0", "not a Python file"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files(name, here, monkeypatch):
    """They are read without running them, and what becomes a recipe runs nothing of theirs."""
    monkeypatch.setenv("MY_TOKEN", "secret")
    (here / "theirs.py").write_text(CONFIG + CONFIGS[name][0])
    reason = CONFIGS[name][1]
    if reason is None:
        (here / "ours.py").write_text(recipe_source(import_config("theirs.py"), "theirs.py"), encoding="utf-8")
        assert resolve("ours.py").data.train == "x/train.rec"
    else:
        with pytest.raises(ValueError, match=f"theirs.py.*{reason}"):
            import_config("theirs.py")


def test_saved_configurations_have_the_types_of_their_fields():
    """Every field of every section, with a value of each wrong kind."""
    good = json.loads(json.dumps(as_dict(TrainConfig())))
    assert from_dict(good) == TrainConfig()
    deep: dict[str, object] = {}
    for _ in range(2000):
        deep = {"a": deep}
    wrong = [[], "x", None, 5, -1, 10**400, float("nan"), {"a": 1}, [[[1]]], "\0", deep, True, {"\x1b": 1}]
    cases: list[object] = [*wrong]
    for section in good:
        cases += [good | {section: value} for value in wrong]
        for field in good[section]:
            cases += [good | {section: good[section] | {field: value}} for value in wrong]
    for case in cases:
        try:
            from_dict(case)  # type: ignore[arg-type]
        except ValueError as error:
            assert len(str(error)) < 600 and str(error).isprintable()
    for section, value in (("run", {"batch": "64"}), ("data", {"image_size": 1.5}), ("loss", {"name": ["cosface"]}), ("engine", [])):
        with pytest.raises(ValueError, match="saved configuration"):
            from_dict(copy.deepcopy(good) | {section: value})


SAID = {"consumed": 0, "width": 4, "backbone": "mobilefacenet", "config": {"data": {}}, "started_from": None}
WRONG = [
    *({"consumed": value} for value in ("x", -5, 10**30, 1.5, [1])),
    *({"config": value} for value in ("x", [1], 5, {"data": 5})),
    *({"started_from": value} for value in ("x", {"given": "x"})),
    {"num_classes": "many"}, {"backbone": ["x"]}, {"optimizer": 5}, {"frozen": "all"}, {"figures": "x"}, {"skipped_steps": True},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_checkpoint_says_is_of_the_kinds_that_runs_say(wrong, here, caplog):
    """With checksums that fit: who makes the file makes those too."""
    checkpoint.save(str(here / "checkpoints"), 0, {"a": checkpoint.whole(torch.zeros(3))}, SAID | wrong, keep=1)
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* can be used"):
        checkpoint.locate(str(here))
    assert "protoshard.json cannot be used: it is not a manifest" in caplog.text


def test_sentences_send_nothing_to_the_terminal():
    with pytest.raises(ValueError, match="unknown") as caught:
        resolve("\x1b[2J")
    assert describe(caught.value) == str(caught.value)
    try:
        from_dict({"run": {"\x1b]0;title\x07": 1}})
    except ValueError as error:
        error.args = (f"{error.args[0]} \x1b[2J \r\nsecond line s3://a:SECRET@b",)
        assert describe(error) is not None and describe(error).endswith(" \\x1b[2J \nsecond line s3://***@b")


def test_a_checkpoint_that_says_nothing_is_not_evaluated(here, capsys):
    checkpoint.save(str(here / "checkpoints"), 0, {"a": checkpoint.whole(torch.zeros(3))}, {}, keep=1)
    assert main(["eval", str(here), "--data", "a.tar"]) == 2
    assert "does not say which network it is of" in capsys.readouterr().err


# Names

RECIPES = [
    "../../pwned",
    "os",
    "os.system",
    "__import__('os').system('touch pwned')",
    "pwned;touch pwned",
    "a\0b",
    "",
    ".",
    "/",
    "-c",
    "file:///x.py",
]


@pytest.mark.parametrize("name", [*RECIPES, "../pwned.py", "a\0b.py", "\x1b[2J.py", "."])
def test_names_of_recipes_import_nothing(name, here):
    (here / "pwned_module.py").write_text("open('pwned', 'w')")
    os.mkfifo(here / "pipe.py")
    for recipe in (name, "pwned_module", "pipe.py"):
        with pytest.raises(ValueError, match=r"recipe .* is unknown|recipe file .* does not exist, or is no regular file") as caught:
            resolve(recipe)
        assert str(caught.value).isprintable()
    (here / "pwned_module.py").unlink()


def test_a_list_of_pairs_names_files_of_its_folder_alone(here):
    (here / "images").mkdir()
    (here / "outside.jpg").write_bytes(b"x")
    for name in ("../outside.jpg", str(here / "outside.jpg"), "a/../../outside.jpg"):
        with pytest.raises(ValueError, match=r"pairs\.txt names .*outside\.jpg, which lies outside images"):
            find_images(PairList([(name, name)], [True], 1), "pairs.txt", "images")


def test_names_that_a_server_makes_up_stay_in_the_cache(here, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    def glob(self, path, **named):
        return {f"/bucket/{name}": {"type": "file", "size": 4, "name": name} for name in ("a.tar", *made_up)}

    monkeypatch.setattr(MemoryFileSystem, "glob", glob)
    made_up: list[str] = []
    for name in ("/pwned.tar", "../pwned.tar", "x/../../../pwned.tar", f"{here}/pwned.tar", "./pwned.tar", "pwned\0.tar"):
        made_up[:] = [name]
        with pytest.raises(ValueError, match="a file's name would lead out of the cache folder"):
            fetch("memory://bucket/**/*.tar", str(here / "cache"))
    for address in ("memory://bucket/x/{a,../../pwned}.tar", "memory://bucket/x/{a,/pwned}.tar"):
        with pytest.raises(ValueError, match="leaves its folder"):
            fetch(address, str(here / "cache"))


@pytest.mark.parametrize("name", ["../../pwned", "/pwned", "a\0b", "\x1b[2J", "x" * 500, "é" * 300, "a/b c\n"])
def test_names_of_sets_in_names_of_files(name, here):
    (here / f"roc-{file_name(name)}-00000001.png").touch()
    assert len(os.listdir(here)) == 1 and file_name(name) != file_name(name + "y")


def test_names_of_any_characters_can_be_printed():
    for name in ("\ud800", "\udcff", "a\x1b[2J\n", b"\xff\x00", "\u202e"):
        assert printable(name).isprintable() and printable(name).encode()
    assert printable("\udcff") == "\\xff"


# Secrets


def test_addresses_show_no_secrets(here, capsys, monkeypatch):
    shown = without_secrets(
        "s3://KEY:SECRET@b/a-{0..9}.tar, https://h/a.tar?X-Amz-Signature=SECRET&x=1; https://TOKEN@h/b-?.tar /local?a=b"
    )
    assert shown == "s3://***@b/a-{0..9}.tar, https://h/a.tar?*** https://***@h/b-?.tar /local?a=b"
    for address in (
        "s3://k:x@SECRET@b/a",
        "s3://k:x/SECRET@b/a",
        "https://h/b-?.tar?x=1,sig=SECRET",
        "url: /a?sig=SECRET (",
        "s3://b/a#t=SECRET",
    ):
        assert "SECRET" not in without_secrets(address), address
    for text in ("x" * 1_000_000, "a://" * 10_000, "s3://k:" + "p/" * 10_000):  # of a library's error; in a time that grows with its length
        assert without_secrets(text) == text
    assert without_secrets("s3://k:s@b/a,s3://b/c@2x http://h:80/p@2") == "s3://***@b/a,s3://b/c@2x http://h:80/p@2"
    config = resolve("faces_small", ["data.train=https://me:SECRET@127.0.0.1:9/a.tar?sig=SECRET", "evaluation.data=s3://k:SECRET@b/c.tar"])
    assert "SECRET" not in json.dumps(as_dict(config)) + as_text(config) and "https://***@127.0.0.1:9/a.tar?***" in as_text(config)
    monkeypatch.setattr("dali_loaders.remote.time.sleep", lambda seconds: None)
    assert main(["data", "check", "noscheme://me:SECRET@host/a.tar?sig=SECRET"]) == 2
    said = capsys.readouterr()
    assert "noscheme://***@host/a.tar" in said.err and "SECRET" not in said.err + said.out


def note_sockets(folder: str) -> None:
    """Runs on every rank."""
    place = join("cpu")
    dist.all_reduce(torch.ones(1))
    addresses = {connection.laddr.ip for connection in psutil.Process().net_connections("inet")}
    Path(folder, f"rank-{place.rank}.json").write_text(json.dumps(sorted(addresses)))
    dist.barrier()


def test_ranks_of_one_machine_talk_on_loopback_alone(here, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    run_local(2, note_sockets, str(here))
    assert [json.loads((here / f"rank-{rank}.json").read_text()) for rank in (0, 1)] == [["127.0.0.1"], ["127.0.0.1"]]


def test_no_reader_takes_objects(here):
    """Of what could run a file, nothing is used."""
    np.save("a.npy", np.array([Attack()], dtype=object), allow_pickle=True)
    sources = [
        path
        for folder in ("dali_loaders", "pipeline", "partial_fc", "launch")
        for path in Path(__file__).parents[2].joinpath(folder).rglob("*.py")
    ]
    text = {path: path.read_text() for path in sources}
    assert not [path for path in sources if "allow_pickle=True" in text[path] or "yaml.load" in text[path] or "shell=True" in text[path]]
    assert not [
        path for path in sources if "pickle.load" in text[path].replace("plain_pickle.load", "") or "weights_only=False" in text[path]
    ]
    with pytest.raises(ValueError, match="allow_pickle=False"):
        np.load("a.npy")
