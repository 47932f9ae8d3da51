"""What the commands say of themselves, and of what is typed wrongly: help, recipes, fields, numbers, the place of --set, completion."""

from __future__ import annotations

import argparse
import os
import subprocess
import textwrap
from dataclasses import fields, is_dataclass

import pytest

from dali_loaders.faces import FacesConfig, write_faces
from partial_fc import losses
from pipeline.cli import main
from pipeline.commands import Parser, count, positionals_first
from pipeline.config import TrainConfig
from pipeline.field_help import allowed, explained, meanings_of
from pipeline.recipes import RECIPES
from pipeline.resolve import resolve

COMMANDS = ["train", "eval", "recipes", "config", "completion", "plan", "import insightface", "import adaface", "import cvlface"]
COMMANDS += [f"data {name}" for name in ("faces", "pack", "pairs", "check", "preview")]
COMMANDS += [f"checkpoint {name}" for name in ("list", "verify", "show", "diff", "copy")]
COMMANDS += [f"bench {name}" for name in ("classifier", "step", "accuracy", "losses", "loader", "training")]


def said(arguments, capsys) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["", "data", "checkpoint", "import", "bench", *COMMANDS])
def test_help_fits_a_terminal_of_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, error = said([*name.split(), "--help"], capsys)
    assert code == 0 and not error and max(map(len, out.splitlines())) <= 80
    assert name not in COMMANDS or out.count("example:") == 1


def test_help_of_train_lists_recipes_and_exit_codes(capsys):
    out = said(["train", "--help"], capsys)[1]
    assert all(name in out for name in RECIPES) and all(f"{code} " in out.partition("exit codes:")[2] for code in (0, 2, 75, 76))


def test_version(capsys):
    code, out, _ = said(["--version"], capsys)
    assert code == 0 and out.startswith("protoshard ") and "torch" in out


def test_recipes_are_listed_with_their_commands(capsys):
    code, out, _ = said(["recipes"], capsys)
    for name, recipe in RECIPES.items():
        first = recipe.__doc__.splitlines()[0]
        assert name in first and f"{name}\n    {first}\n" in out
    assert code == 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train --set a.b=1 faces_small", "train faces_small --set a.b=1"),
        ("train --set a.b=1 c=2 mine.py --ranks 2 --set d=3", "train mine.py --set a.b=1 c=2 --ranks 2 --set d=3"),
        ("data preview --set a=1 x.tar faces_small --out y.png", "data preview x.tar faces_small --set a=1 --out y.png"),
        ("train faces_small --set a=1", "train faces_small --set a=1"),
        ("train --set a faces_small", "train --set a faces_small"),  # for --set to complain of
        ("train faces_small --set=a=1", "train faces_small --set=a=1"),
        ("train -- --set a=1 b", "train -- --set a=1 b"),
    ],
)
def test_set_does_not_swallow_what_stands_behind_it(typed, meant):
    assert positionals_first(typed.split()) == meant.split()


def test_set_before_the_recipe(capsys):
    code, out, _ = said(["config", "--set", "run.epochs=3", "run.seed=1", "faces_small", "--set", "run.seed=2"], capsys)
    assert code == 0 and "run.epochs = 3.0\n" in out and "run.seed = 2\n" in out


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e7", 10**7), ("10M", 10**7), ("10_000_000", 10**7), ("10,000,000", 10**7), ("1.5M", 1_500_000), ("2k", 2000), ("-3", -3), ("0", 0)],
)
def test_numbers_of_things(text, number):
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e-3", "M", "nan", "inf", "1e999", "1,5", "1__0", "0x10"])
def test_what_is_no_number_of_things(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no whole number, such as 10000000, 1e7 or 10M"):
        count(text)


def test_a_number_beyond_floats_is_exact():
    assert count("9007199254740993") == 9007199254740993


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("Yes", True), ("on", True), ("1", True), ("FALSE", False), ("no", False), ("0", False)]
)
def test_spellings_of_yes_and_no(text, value):
    assert resolve("dogs_small", [f"run.deterministic={text}"]).run.deterministic is value


def test_whole_numbers_as_people_write_them():
    run = resolve("dogs_small", ["run.batch=1e3", "run.log_every=1_0"]).run
    assert (run.batch, run.log_every) == (1000, 10) and isinstance(run.batch, int)


NOWHERE = "(no file can be made there): choose another place."
OF_A_FILE = "is the name of a file: choose another, or write"
MISTAKES = {
    "trian": ": argument COMMAND: 'trian' is unknown: did you mean 'train'?",
    "data chek": " data: argument COMMAND: 'chek' is unknown: did you mean 'check'?",
    "train": " train: the following arguments are required: RECIPE; see protoshard train --help",
    "config faces_small more": ": unrecognized arguments: more; see protoshard COMMAND --help",
    "config no/such.py": ": recipe file no/such.py does not exist, or is no regular file",
    "config face_small": ": recipe 'face_small' is unknown: did you mean 'faces_small'? `protoshard recipes` lists all; a file of yours "
    "ends in .py",
    "config faces_small --set run.folder=a.zip": f": run.folder is a folder, but a.zip {OF_A_FILE} a.zip/ if you mean it.",
    "data check f.tar --near x": " data check: argument --near: 'x' is no number",
    "plan --identities ten": " plan: argument --identities: 'ten' is no whole number, such as 10000000, 1e7 or 10M",
    "plan --identities 1e7 --engine int8": " plan: argument --engine: 'int8' is unknown: choose one of ddp, deepspeed",
    "data faces out.zip": ": faces are written to a .tar, a .rec or a folder, but out.zip is none of them; if you mean a folder, write "
    "out.zip/",
    "data faces /proc/out.tar": f": the set of faces cannot be written to /proc/out.tar {NOWHERE}",
    "data pack x y.zip": ": the packed set would be named y.zip; give it a name that ends in .rec or .tar.",
    "data pack x none/y.rec": ": the packed set cannot be written to none/y.rec (there is no folder {here}/none): choose another place.",
    "data pairs x y.zip": ": the pair set would be named y.zip; give it a name that ends in .bin.",
    "data check x --fix /proc/y.rec": f": the clean set cannot be written to /proc/y.rec {NOWHERE}",
    "data check x --figure y.svg": ": --figure would be named y.svg; give it a name that ends in .png.",
    "data preview x faces_small --out /proc/y.png": f": --out cannot be written to /proc/y.png {NOWHERE}",
    "eval x --data y --figure /proc/z/y.png": f": --figure cannot be written to /proc/z/y.png {NOWHERE}",
    "import adaface x --out y.zip": f": --out is a folder, but y.zip {OF_A_FILE} y.zip/ if you mean it.",
    "bench accuracy --csv /proc/y.csv": f": --csv cannot be written to /proc/y.csv {NOWHERE}",
}


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES.items())
def test_mistakes_end_in_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, error = said(arguments.split(), capsys)
    *starting, refused = error.splitlines()
    assert (code, out, refused) == (2, "", f"protoshard{sentence.format(here=tmp_path)}")
    assert len(starting) <= 1 and all(line.endswith("  starting") for line in starting)
    assert os.listdir(tmp_path) == []


def test_faces_in_a_folder_with_a_dot(tmp_path):
    write_faces(f"{tmp_path}/faces.v2/", FacesConfig(identities=1, images_per_identity=1, size=32), workers=1)
    assert os.listdir(tmp_path / "faces.v2") == ["000000"]


def sections(part):
    for item in fields(part):
        if is_dataclass(value := getattr(part, item.name)):
            yield from sections(value)
    yield part


@pytest.mark.parametrize("section", sections(TrainConfig()), ids=lambda section: type(section).__name__)
def test_every_field_says_what_it_means(section):
    assert meanings_of(type(section)).keys() >= {item.name for item in fields(section) if not is_dataclass(getattr(section, item.name))}


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_every_option_of_a_loss_says_what_it_means(name):
    loss = losses.REGISTRY[name]
    assert meanings_of(loss).keys() == {item.name for item in fields(loss)}


def test_fields_are_explained_with_unit_type_and_default(capsys):
    code, out, _ = said(["config", "faces_small", "--explain", "--set", "loss=gce"], capsys)
    assert code == 0
    words = " ".join(out.split())
    assert "run.timeout = 60.0 minutes that ranks wait" in words and "data.timeout = 300.0 seconds that the read" in words
    assert "sgd or adamw; default sgd" in words and "loss.alpha = 0.5 weight of the target's term a number from 0 to 1: it is" in words
    assert "run.epochs = 12 passes over the images; parts of one are allowed a number; default 20.0" in words
    assert all(len(line) < 80 for line in out.splitlines() if line.startswith(" "))


def test_meanings_come_from_docstrings_too_and_go_on_in_the_next_line():
    meaning = meanings_of(type(TrainConfig().backbone))["name"]
    assert meaning.startswith('"iresnet18", 34') and meaning.endswith("Or the name of a registered network.")
    assert meanings_of(losses.REGISTRY["gb_cosface"])["most"] == "limits of the global boundary"
    assert allowed(int | None) == "a whole number or none" and allowed(tuple[str, ...]) == "a text, or several between commas"


def test_a_loss_of_ones_own_is_explained(tmp_path):
    (tmp_path / "mine.py").write_text(textwrap.dedent('''\
        from partial_fc import losses
        from partial_fc.losses import Loss
        from pipeline.config import TrainConfig

        @losses.register("explained_here")
        class Mine(Loss):
            pull: float = 0.5  # towards the centre

            def __call__(self, batch):
                return batch

        def recipe():
            return TrainConfig(loss=Mine())
    '''))  # fmt: skip
    try:
        assert "loss.pull = 0.5\n    towards the centre\n    a number; default 0.5" in explained(resolve(str(tmp_path / "mine.py")))
    finally:
        losses.REGISTRY.pop("explained_here", None)


def test_photos_take_any_folder_of_identities(tmp_path, capsys):
    for name, first in (("photos", 0), ("others", 100)):
        write_faces(str(tmp_path / name), FacesConfig(identities=8, images_per_identity=4, size=48, first_identity=first), workers=1)
    settings = [f"data.train={tmp_path / 'photos'}", f"run.folder={tmp_path / 'run'}", "run.epochs=2", "run.batch=16"]
    assert main(["train", "--set", *settings, f"evaluation.data={tmp_path / 'others'}", "photos"]) == 0
    assert "others EER" in capsys.readouterr().out
    assert main(["train", "photos", "--set", *settings[:1], f"run.folder={tmp_path / 'alone'}", *settings[2:]]) == 0
    code, _, error = said(["train", "photos"], capsys)
    assert code == 2 and error.endswith("a folder of identities, a .tar or a .rec with --set data.train=PATH\n")


def test_completion_of_commands_options_and_recipes(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        line = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _shtab_protoshard; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=False)
        return done.stdout.split()

    assert completed("protoshard", "tr") == ["train"]
    assert completed("protoshard", "train", "webface42m_v") == ["webface42m_vit_t_64gpu", "webface42m_vit_b_64gpu"]
    assert completed("protoshard", "data", "fa") == ["faces"]
    assert completed("protoshard", "eval", "--fig") == ["--figure"]
    for shell in ("zsh", "fish", "tcsh"):  # not run here
        assert main(["completion", shell]) == 0 and "photos" in capsys.readouterr().out + "photos" * (shell == "tcsh")


def test_errors_of_argparse_that_are_none_of_ours_stay(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--a", type=int)
    for arguments, end in ((["--a"], "argument --a: expected one argument\n"), (["--a", "b"], "argument --a: 'b' is no number\n")):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(arguments)
        assert capsys.readouterr().err.endswith(end)
