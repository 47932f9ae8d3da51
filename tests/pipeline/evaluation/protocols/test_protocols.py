"""Protocols by name: what is known, what is refused, protocols of one's own, and protocols in runs."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dali_loaders.sources import FolderSource
from pipeline.cli import main
from pipeline.evaluation import evaluate, write_bin
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.evaluation.protocols import OPTIONS, description, names, of_path, open_protocol, register, registry
from pipeline.monitor import MonitorConfig
from pipeline.same_data import open_on_all_ranks
from pipeline.train import train
from tests.pipeline.people import DATA, flat, write_images
from tests.pipeline.runs import configuration, faces

KNOWN = {"all_pairs", "bin", "cfp_fp", "mfr", "pairs_list", "rfw", "ytf"}


def people(folder, groups=("A", "B"), identities=3, images=2):
    """GROUP/IDENTITY/IMAGE."""
    files = [f"{group}/{group}{at}/{image}.png" for group in groups for at in range(identities) for image in range(images)]
    write_images(folder, files, lambda name: name.split("/")[1], noise=60)
    return str(folder)


@pytest.fixture
def registered(monkeypatch):
    """What a test registers goes with it."""
    monkeypatch.setattr(registry, "_PROTOCOLS", dict(registry._PROTOCOLS))


def test_every_protocol_is_found_and_described(capsys):
    assert set(names()) >= KNOWN
    assert main(["protocols"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == names()
    assert max(map(len, lines)) < 80
    assert all(description(name).endswith(".") for name in names())


def test_the_default_of_a_path():
    assert (of_path("x/lfw.bin"), of_path("x/lfw"), of_path("x.rec")) == ("bin", "all_pairs", "all_pairs")


def test_unknown_names_and_options(tmp_path):
    with pytest.raises(ValueError, match=r"there is no protocol 'pair_list' \(did you mean 'pairs_list'\?\); `protoshard protocols`"):
        open_protocol("pair_list", "x", DATA)
    with pytest.raises(ValueError, match=r"there is no protocol 'qqqq' \(choose one of all_pairs, bin"):
        open_protocol("qqqq", "x", DATA)
    with pytest.raises(ValueError, match=r"the protocol all_pairs of x has no option --images; it has --resamples, --cleaning\."):
        open_protocol(None, "x", DATA, {"images": "y", "allow_missing": None})
    with pytest.raises(ValueError, match=r"the protocol bin of x.bin has no option --allow-missing; it has --resamples"):
        open_protocol(None, "x.bin", DATA, {"allow_missing": True})
    assert set(OPTIONS) == {"images", "allow_missing", "resamples", "cleaning"}


def test_a_list_needs_a_named_protocol():
    with pytest.raises(ValueError, match=r"lfw/pairs.txt is a list, whose protocol must be named, such as --protocol pairs_list"):
        open_protocol(None, "lfw/pairs.txt", DATA)


def test_two_protocols_may_not_have_one_name(registered):
    class Mine:
        """One. Two."""

    assert register("mine")(Mine) is register("mine")(Mine)  # as when a module is imported again
    with pytest.raises(ValueError, match="there is a protocol named 'bin' already: register yours under another name"):
        register("bin")(Mine)


RECIPE = '''
from dataclasses import replace
from dali_loaders.sources import open_source
from pipeline.backbones import BackboneConfig
from pipeline.engine import EngineConfig
from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.protocols import register
from pipeline.recipes.small import faces_small

@register("halves")
class Halves:
    """The two halves of a set, each for itself."""

    def __init__(self, path, data, *, resamples=None):
        self.source = open_source(path)

    def evaluate(self, embedder):
        rows, numbers = embedder.embed(self.source)
        labels, half = self.source.labels[numbers], len(numbers) // 2
        report = all_pairs(rows, labels, resamples=0, **embedder.ranks)
        report.groups["first"] = all_pairs(rows[:half], labels[:half], resamples=0, **embedder.ranks)
        return report

def recipe():
    config = replace(faces_small(), backbone=BackboneConfig("small_nobn", width=16, dropout=0.0), engine=EngineConfig("ddp"))
    return replace(config, data=replace(config.data, image_size=32))
'''


def test_a_protocol_of_one_s_own_in_a_run_and_in_eval(tmp_path, registered, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own.py").write_text(RECIPE)
    data, run = faces(str(tmp_path)), str(tmp_path / "run")
    settings = [f"data.train={data}", f"evaluation.protocols=halves:{data}", f"run.folder={run}", "run.batch=26", "run.epochs=1"]
    assert main(["train", str(tmp_path / "own.py"), "--set", *settings, "evaluation.data="]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    of_run = [row for row in rows if "faces/eer" in row][-1]
    assert of_run["faces/identities"] == 13 and of_run["faces/first/images"] == 39
    capsys.readouterr()
    command = ["eval", run, "--data", data, "--protocol", "halves"]
    figure = tmp_path / "roc.png"
    assert main([*command, "--recipe", str(tmp_path / "own.py"), "--json", "--figure", str(figure)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["eer"], found["first"]["eer"]) == (of_run["faces/eer"], of_run["faces/first/eer"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(registry, "_PROTOCOLS", {name: registry._PROTOCOLS[name] for name in KNOWN})
    assert main(command) == 2 and "there is no protocol 'halves'" in capsys.readouterr().err


def test_groups_are_printed_side_by_side_and_drawn(tmp_path, registered, capsys):
    data, run = faces(str(tmp_path)), str(tmp_path / "run")
    train(configuration(data, run, 1))
    folder = people(tmp_path / "people", groups=("A", "B", "South_Asian_people"))
    figure = tmp_path / "roc.png"
    assert main(["eval", run, "--data", folder, "--protocol", "mfr", "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    blank = lines.index("")
    assert any(line.startswith("tar_at_far=1e-1 ") for line in lines[:blank])
    assert lines[blank + 1].split() == ["A", "B", "South_Asian_people"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[blank + 2 :]}
    assert rows["images"] == ["6"] * 3 and rows["genuine_pairs"] == ["3"] * 3 and rows["tar_at_far=1e-6"] == ["unreached"] * 3
    assert max(map(len, lines)) <= 120 and figure.stat().st_size > 10_000


def test_protocols_of_a_run(tmp_path):
    """Their figures are in metrics.jsonl and, in the set's group, in TensorBoard; those of their groups below their names."""
    folder = people(tmp_path / "people")
    evaluation = EvaluationConfig(protocols=(f"mfr:{folder}",))
    config = configuration(faces(str(tmp_path)), str(tmp_path / "run"), 2, evaluation=evaluation, monitor=MonitorConfig())
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "people/eer" in row]
    assert {"people/A/eer", "people/B/tar_at_far/1e-1", "people/rank1"} <= row.keys()
    events = EventAccumulator(str(next((tmp_path / "run" / "tensorboard").rglob("events*")).parent), size_guidance={"scalars": 0})
    tags = events.Reload().Tags()["scalars"]
    assert {"evaluation/people/eer", "evaluation/people/A/eer", "evaluation/people/B/tar_at_far/1e-1"} <= set(tags)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before  # a run that is complete changes nothing


@pytest.mark.parametrize(
    ("protocols", "words"),
    [
        (
            ("mfr:{}/nowhere",),
            r"evaluation.protocols: .*nowhere cannot be listed.* Name another set, or none with --set",
        ),
        (
            ("mfrr:{}/people",),
            r"evaluation.protocols: there is no protocol 'mfrr' \(did you mean 'mfr'\?\); `protoshard protocols` lists what there is",
        ),
        (
            ("pairs_list:{}/list.txt",),
            r"with --images. \(Options are of `protoshard eval`; of a run, images must lie or be linked where the protocol looks.\) Name",
        ),
        (("pairs_list:{}/pairs.txt",), r"evaluation.protocols: .*pairs.txt cannot be read as a list of pairs"),
        (
            ("mfr:{}/people", "all_pairs:{}/people"),
            r"people is named twice: the same set; name it once in evaluation.data, pairs and protocols",
        ),
    ],
)
def test_sets_that_cannot_be_opened_cost_no_training(tmp_path, protocols, words):
    people(tmp_path / "people")
    (tmp_path / "list.txt").write_text("Ann 1 2\nAnn 1 Bo 1\n")
    evaluation = EvaluationConfig(protocols=tuple(protocol.format(tmp_path) for protocol in protocols))
    with pytest.raises(ValueError, match=words):
        train(configuration(faces(str(tmp_path)), str(tmp_path / "run"), 1, evaluation=evaluation))
    assert not list((tmp_path / "run").rglob("*.jsonl"))


@pytest.mark.parametrize("named", ["mfr", "mfr:", ":x"])
def test_protocols_have_a_name_and_a_path(named):
    with pytest.raises(ValueError, match=rf"evaluation.protocols has '{named}'; expected NAME:PATH"):
        EvaluationConfig(protocols=(named,))


def opened(protocol: str, paths: list[str], images: str) -> str:
    """The sentence that this rank gives when every rank opens its own list over the same images."""
    path, options = paths[dist.get_rank()], {"images": images} if images else {}
    try:
        return str(open_on_all_ranks(path, lambda: open_protocol(protocol, path, DATA, options).source)[1]["lists"])
    except ValueError as error:
        return str(error)


def test_ranks_with_other_lists_of_the_same_images_are_named(tmp_path, ranks):
    write_images(tmp_path / "lfw", [f"A/A_000{at}.jpg" for at in range(1, 4)] + ["B/B_0001.jpg"], lambda name: name[0])
    lines = ["A\t1\t2", "A\t2\t3", "A\t1\tB\t1", "A\t2\tB\t1"]
    (tmp_path / "one.txt").write_text("\n".join(lines))
    (tmp_path / "two.txt").write_text("\n".join([lines[0], "A\t1\t3", *lines[2:]]))  # names the same images in the same order
    paths = [str(tmp_path / name) for name in ("one.txt", "two.txt")]
    first, second = ranks(2).run(opened, "pairs_list", paths, str(tmp_path / "lfw"))
    for sentence in (first, second):
        assert "is not the same for all ranks: rank 1 on" in sentence and "sees other lists of pairs, folds or templates" in sentence
    assert len(set(ranks(2).run(opened, "pairs_list", paths[:1] * 2, str(tmp_path / "lfw")))) == 1
    for name, same in (("one.bin", [True, False]), ("two.bin", [False, True])):
        write_bin(str(tmp_path / name), [b"x"] * 4, same)
    bins = [str(tmp_path / name) for name in ("one.bin", "two.bin")]
    assert "other lists of pairs" in ranks(2).run(opened, "bin", bins, "")[0]


def test_a_copy_of_a_set_in_another_folder_is_the_same_to_ranks(tmp_path, ranks):
    for place in ("one", "two"):
        write_images(tmp_path / place / "lfw", ["A/A_0001.jpg", "A/A_0002.jpg", "B/B_0001.jpg"], lambda name: name[0])
        (tmp_path / place / "pairs.txt").write_text("A\t1\t2\nA\t1\tB\t1\n")
        shutil.move(tmp_path / place / "lfw" / "A", tmp_path / place / "A")
        shutil.move(tmp_path / place / "lfw" / "B", tmp_path / place / "B")
    paths = [str(tmp_path / place / "pairs.txt") for place in ("one", "two")]
    seen = ranks(2).run(opened, "pairs_list", paths, "")
    assert seen[0] == seen[1] and len(seen[0]) == 8


def test_the_example_of_the_page(tmp_path, registered):
    page = (Path(__file__).parents[4] / "docs" / "evaluation.md").read_text()
    exec(page.partition("### A protocol of your own")[2].partition("```python\n")[2].partition("```")[0], {})
    report = evaluate(flat, people(tmp_path / "people", groups=("A",)) + "/A", DATA, protocol="halves", options={"resamples": 0})
    assert (report.images, description("halves")) == (3, "The first half of a set, for itself.")


@dataclass
class Whole:
    """A comparison without options."""

    path: str
    data: object

    def __post_init__(self) -> None:
        self.source = FolderSource(self.path)

    def evaluate(self, embedder):
        from pipeline.evaluation.all_pairs import all_pairs

        rows, numbers = embedder.embed(self.source)
        return all_pairs(rows, np.asarray(self.source.labels)[numbers], resamples=0)


def test_a_class_is_a_protocol_by_being_registered(tmp_path, registered):
    register("whole")(Whole)
    report = evaluate(flat, people(tmp_path / "people", groups=("A",)) + "/A", DATA, protocol="whole")
    assert report.images == 6
    with pytest.raises(ValueError, match="has no option --resamples; it has none"):
        open_protocol("whole", str(tmp_path), DATA, {"resamples": 3})
