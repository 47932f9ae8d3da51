"""Config files are read, never run; what cannot be worked out stops only whoever asks for it."""

import pytest

from pipeline.interop.plain_config import read_config
from pipeline.interop.plain_values import Function


def read(tmp_path, text, name="example.py"):
    path = tmp_path / name
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


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ("config.key = f'{config.lr:g}_{3}'", "0.1_3"),
        ("more = dict(key=4)\nconfig = edict(config, **more)", 4),
        ("config.key = os.environ.get('PROTOSHARD_NONE', '/data')", "/data"),
        ("config.key = os.environ.get('PROTOSHARD_SET', '/data')", "/set"),
        ("config.key = os.path.join(os.environ['PROTOSHARD_SET'], 'ms1m')", "/set/ms1m"),
        ("config.key = int(os.getenv('PROTOSHARD_NONE', '8')) * 2", 16),
        ("config.key = config['lr'] * 2", 0.2),
        ("config['key'] = 1", 1),
        ("config.key = 1\nconfig.key = 2", 2),  # the last one counts, as in Python
        ("config.key = 1\nconfig.key += 2", 3),
        ("config.key: int = 4", 4),
        ("config.key, config.other = 1, 2", 1),
        ("config.update(key=5)", 5),
        ("config.update({'key': 6})", 6),
        ("config.key = config.get('none', 7)", 7),
        ("dataset = 'emore'\nif dataset == 'webface':\n    config.key = 1\nelif dataset in ('emore', 'ms1m'):\n    config.key = 2", 2),
        ("config.key = 1 if config.lr > 1 or not config.lr else 3", 3),
        ("config.key = 1\nif __name__ == '__main__':\n    config.key = 2", 1),
        ("options = config\noptions.key = 8", 8),
        ("other = deepcopy(config)\nother.key = 1\nconfig.key = 2", 2),
        ("config.key = max(1, len(config.list))", 3),
        ("print(config)\nconfig.key = 1", 1),
        ("os.makedirs('/none')\nconfig.key = 1", 1),
        ("class A: pass\nconfig.key = 1", 1),
        ("names = {}\nnames['a'] = 1\nconfig.key = names['a']", 1),
    ],
)
def test_what_forks_write(tmp_path, monkeypatch, lines, value):
    monkeypatch.setenv("PROTOSHARD_SET", "/set")
    text = f"import os\nfrom copy import deepcopy\nconfig = edict(lr=0.1)\nconfig.list = [1, 2, 3]\n{lines}\n"
    assert read(tmp_path, text)["key"] == value


@pytest.mark.parametrize(
    "line",
    [
        "config.key = os.environ['PROTOSHARD_NONE']",
        "config.key = os.environ.get('PROTOSHARD_NONE')",
        "config.key = __import__('os').getcwd()",
        "config.key = open('/etc/passwd').read()",
        "config.key = [i for i in (1, 2)]",
        "config.key = 9 ** 9 ** 9",
        "config.key = 'a' * 1000000000",
        "config.key = (0,) * 1000000000",
        "config.key = f'{config}'",
        "config.key = f'{1:1000000000}'",
        "config.key = config.__class__",
        "config.key = 1 / 0",
        "config.key = 1 + 'a'",
        "config.key = config.missing",
        "config.key = -'a'",
        "for i in (1, 2): config.key = i",
        "config.key = 1\nif unknown(): config.key = 2",
        "config.key = 1\ntry:\n    config.key = 2\nexcept OSError:\n    pass",
        "config.key, config.other = unknown()",
    ],
)
def test_what_cannot_be_worked_out_stops_whoever_asks_for_it(tmp_path, line):
    config = read(tmp_path, f"import os\nconfig = edict()\nconfig.lr = 0.1\n{line}\n")
    assert config["lr"] == 0.1 and "key" in config
    with pytest.raises(ValueError, match=r"config\.key is needed, but .*example\.py:\d: cannot read `.*`.*; write the value out"):
        config["key"]
    with pytest.raises(ValueError, match=r"config\.key is needed"):
        config.get("key")


@pytest.mark.parametrize(
    "line",
    [
        "config.update(load('a.yaml'))",
        "config.pop('lr')",
        "merge(config, 'a.yaml')",
        "config.key = change(config)",
        "setattr(config, 'lr', 1)",
        "config[name()] = 1",
        "del config.lr",
        "if unknown():\n    change(config)",
        "from configs.base import *",
        "config.lr.value = 1",
        "exec('config.lr = 3')",
    ],
)
def test_what_may_change_any_option_stops_with_file_and_line(tmp_path, line):
    with pytest.raises(ValueError, match=r"example\.py:[34]: cannot read `.*` without running it"):
        read(tmp_path, f"config = edict()\nconfig.lr = 0.1\n{line}\n")


def test_a_function_of_the_file_may_change_options_too(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read `change\(\)` without running it"):
        read(tmp_path, "config = edict()\nconfig.lr = 0.1\ndef change():\n    config.lr = 9\nchange()\n")


def test_configs_that_import_others(tmp_path):
    (tmp_path / "configs").mkdir()
    read(tmp_path, "config = edict(lr=0.1, network='r50')\nepochs = 3\n", "configs/base.py")
    for line in (
        "from configs.base import config",
        "from .base import config",
        "from configs.base import config as theirs\nconfig = deepcopy(theirs)",
        "from .base import *",
        "from configs import base\nconfig = base.config",
    ):
        assert read(tmp_path, f"{line}\nconfig.lr = 0.2\n", "configs/mine.py") == {"lr": 0.2, "network": "r50"}
    with pytest.raises(ValueError, match=r"mine\.py:1: cannot read `from configs\.gone import config`"):
        read(tmp_path, "from configs.gone import config\n", "configs/mine.py")
    (tmp_path / "configs" / "base.py").write_text("from configs.mine import config\n")
    with pytest.raises(ValueError, match="imports itself"):
        read(tmp_path, "from configs.base import config\n", "configs/mine.py")


def test_functions_are_kept_as_they_are_written(tmp_path):
    config = read(tmp_path, "config = edict()\ndef f(epoch):\n    return 1\nconfig.lr_func = f\nconfig.other = lambda epoch: 2\n")
    assert isinstance(config["lr_func"], Function) and isinstance(config["other"], Function)


def test_nothing_in_the_file_is_run(tmp_path):
    marker = tmp_path / "marker"
    read(tmp_path, f"config = edict()\nconfig.x = open({str(marker)!r}, 'w')\nopen({str(marker)!r}, 'w')\n")
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
