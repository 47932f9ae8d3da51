"""Config files are read, never run."""

import pytest

from pipeline.interop.plain_config import read_config


def read(tmp_path, text):
    path = tmp_path / "example.py"
    path.write_text(text)
    return read_config(path)


def test_values_arithmetic_and_references(tmp_path):
    config = read(
        tmp_path,
        '"""A docstring."""\nfrom easydict import EasyDict as edict\nimport os.path as osp\n'
        "config = edict()\nroot = '/faces'\nconfig.rec = root + '/ms1m'\nconfig.list = osp.join(root, 'list.txt')\n"
        "config.num_epoch = 20\nconfig.warmup_epoch = config.num_epoch // 10\n"
        "config.num_classes = 300 * 10000\nconfig.lr = -(1 - 5e-4) / 2\n"
        "config.val_targets = ['lfw', \"agedb_30\"]\nconfig['output'] = None\nconfig.nested = edict(a=1)\nconfig.nested.b = (1.0, True)\n",
    )
    assert config == {
        "rec": "/faces/ms1m",
        "list": "/faces/list.txt",
        "num_epoch": 20,
        "warmup_epoch": 2,
        "num_classes": 3_000_000,
        "lr": -0.49975,
        "val_targets": ["lfw", "agedb_30"],
        "output": None,
        "nested": {"a": 1, "b": (1.0, True)},
    }


def test_edict_from_a_dictionary(tmp_path):
    assert read(tmp_path, "config = edict({'lr': 0.1}, network='r50')\n") == {"lr": 0.1, "network": "r50"}


@pytest.mark.parametrize(
    "line",
    [
        "config.key = os.environ['HOME']",
        "config.key = __import__('os').getcwd()",
        "config.key = open('/etc/passwd').read()",
        "config.key = [i for i in (1, 2)]",
        "config.key = 9 ** 9 ** 9",
        "config.key = 'a' * 1000000000",
        "config.key = (0,) * 1000000000",
        "config.key = f'{config}'",
        "config.lr += 1",
        "config.lr.value = 1",
        "config.key = config.__class__",
        "from configs.base import config",
        "from .base import config",
        "for i in (1, 2): config.lr = i",
        "def f(): pass",
        "print(config)",
        "a, b = 1, 2",
    ],
)
def test_anything_else_names_file_and_line(tmp_path, line):
    with pytest.raises(ValueError, match=r"example\.py:3: cannot (read|work out) `.*`"):
        read(tmp_path, f"config = edict()\nconfig.lr = 0.1\n{line}\n")


@pytest.mark.parametrize("line", ["config.key = 1 / 0", "config.key = 1 + 'a'", "config.key = config.missing", "config.key = -'a'"])
def test_values_that_do_not_work_out(tmp_path, line):
    with pytest.raises(ValueError, match=r"example\.py:2: cannot work out"):
        read(tmp_path, f"config = edict()\n{line}\n")


def test_nothing_in_the_file_is_run(tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(ValueError):
        read(tmp_path, f"config = edict()\nconfig.x = open({str(marker)!r}, 'w')\n")
    assert not marker.exists()


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"example\.py does not define `config`"):
        read(tmp_path, "settings = 1\n")
    with pytest.raises(ValueError, match=r"example\.py:2: this is not a Python file"):
        read(tmp_path, "config = edict()\nconfig. = 1\n")
    with pytest.raises(ValueError, match="cannot read the config file"):
        read_config(tmp_path / "missing.py")
    with pytest.raises(ValueError, match="cannot read the config file"):
        read_config(tmp_path)
