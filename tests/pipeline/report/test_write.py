"""The page as a file: what it says of runs of every kind, what it loads, and what ends in a sentence."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline import report
from pipeline.cli import main
from pipeline.evaluation.evaluate_checkpoint import _curve
from pipeline.report import labels, run_files, set_section
from pipeline.report import page as page_module
from tests.pipeline.report import folders
from tests.pipeline.report.folders import OF, metrics_line

HOSTILE = '<img src=x onerror="hacked=1">$a{$&'


class Seen(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        assert not [name for name in given if name.startswith("on")]
        self.addresses += [given[name] for name in ("src", "href", "srcset", "data", "action") if name in given]
        if tag == "img":
            self.alts.append(given["alt"])

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take nearly all of the time."""
    for module in (page_module, set_section):
        monkeypatch.setattr(module, "address", lambda figure: "data:image/svg+xml;base64,")


def page(*runs, out, more=()):
    report.write([str(run) for run in runs], str(out), more)
    content = out.read_text()
    seen = Seen(content)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(seen.tags)
    assert all(address.startswith(("data:image/", "#")) for address in seen.addresses) and "url(" not in content
    return seen


def test_two_runs_are_compared(tmp_path):
    better = {0: folders.report(0, 0.5), 100: folders.report(2, 3.0)}
    runs = folders.run(tmp_path / "a"), folders.run(tmp_path / "b", {"loss": {"name": "arcface", "slope": "exact"}}, better)
    seen = page(*runs, out=tmp_path / "out.html")
    assert "b has the best EER" in seen.text and "Its interval overlaps with that of no other run." in seen.text
    assert "loss.name" in seen.text and "not a field" in seen.text and "★" in seen.text
    assert "Values of the loss are not comparable" in seen.text
    assert "train.tar: 2 seen, 1 used" in seen.text and "complete, 100 steps" in seen.text
    assert len(seen.alts) > 10 and sum(alt == "" for alt in seen.alts) == 4  # of two keys, whose names stand beside them
    assert os.path.getsize(tmp_path / "out.html") < 2e6


def test_other_images_are_not_compared(tmp_path, undrawn):
    runs = folders.run(tmp_path / "a"), folders.run(tmp_path / "b", of=OF | {"labels": "other"})
    seen = page(*runs, out=tmp_path / "out.html")
    assert "Not compared: these runs did not see the same images" in seen.text and "★" not in seen.text and "☆" not in seen.text


def test_equal_configurations(tmp_path, undrawn):
    seen = page(folders.run(tmp_path / "a"), folders.run(tmp_path / "b"), out=tmp_path / "out.html")
    assert "The configurations are equal but for run.folder." in seen.text and "not comparable" not in seen.text


def test_names_are_shown_and_not_run(tmp_path):
    reports = {5: folders.report(groups={HOSTILE: folders.report(1), "others": folders.report(2)})}
    run = folders.run(tmp_path / HOSTILE, {"data": {"train": HOSTILE}}, reports, name="set <b>$x{$")
    jpeg = "/9j/4AAQ"
    pairs = {"of": OF, "step": 5, "images": 9, "genuine": [{"cosine": 0.5, "identities": [HOSTILE, "</td>"], "jpeg": jpeg}]}
    pairs["impostor"] = [{"cosine": 0.5, "identities": ["a", "b"], "jpeg": '"><script>'}, 7]
    (run / "hard-pairs-set--b--x--.json").write_text(json.dumps(pairs))
    os.rename(run / "curves-set <b>$x{$.npz", run / "curves-set--b--x--.npz")
    seen = page(run, out=tmp_path / "out.html")
    assert seen.text.count(HOSTILE) > 5 and "set <b>$x{$" in seen.text and "</td>" in seen.text
    assert any(HOSTILE in alt for alt in seen.alts) and "impostor pairs that" not in seen.text
    assert f"{folders.report(2).thresholds['threshold_at_far/1e-2']:.4f}" in seen.text and "threshold at FAR 1e-2" in seen.text
    assert "the groups and their mean false reject rate meet" in seen.text


def test_many_long_runs_give_a_page_of_a_few_megabytes(tmp_path):
    noise = np.random.default_rng(0).random(5_000)
    text = "\n".join(metrics_line(20 * i, loss=float(x), gradient_norm=float(x), wait_share=float(x)) for i, x in enumerate(noise))
    runs = []
    for number in range(8):
        runs.append(folders.run(tmp_path / f"run{number}"))
        (runs[-1] / "metrics.jsonl").write_text(text)
        big = [{"cosine": 0.1, "identities": ["a"], "jpeg": "/9j/" + "A" * 40_000}] * 16
        (runs[-1] / "hard-pairs-test.json").write_text(json.dumps({"of": OF, "step": 100, "images": 300, "genuine": big}))
    seen = page(*runs, out=tmp_path / "out.html")
    assert os.path.getsize(tmp_path / "out.html") < 5e6
    assert "Left out, so that the page stays below 5 MB" in seen.text


def test_unfinished_runs_and_those_of_earlier_versions(tmp_path, undrawn):
    running, old, empty = tmp_path / "running", tmp_path / "old", tmp_path / "empty"
    folders.run(running, reports={})
    (running / "metrics.jsonl").write_text(metrics_line(40) + "\n" + '{"step": 50, "lo')
    old.mkdir()
    lines = [metrics_line(10, epoch=0.5), json.dumps({"step": 20, "x/eer": 0.25, "x/images": 70}), "damaged"]
    (old / "metrics.jsonl").write_text("\n".join(lines))
    empty.mkdir()
    (empty / "run.json").write_text('{"data.train": "x"}')
    for run, said in (
        (
            running,
            ["step 40 of 100 (40%), last line 2001-09-09", "1 of 2 lines of metrics.jsonl are damaged", "No evaluation is finished yet"],
        ),
        (old, ["0.2500", "There is no whole evaluations.json", "x: no curves", "Neither run.json nor a checkpoint says", "step 20"]),
        (empty, ["There are no lines of training", "There is no evaluation", "metrics.jsonl cannot be read (No such file or directory)"]),
    ):
        seen = page(run, out=tmp_path / "out.html")
        assert all(one in seen.text for one in said), run
    page(running, old, empty, out=tmp_path / "out.html")


NAMES = ("evaluations.json", "curves-test.npz", "hard-pairs-test.json", "run.json")
DAMAGED = (
    b"",
    b"{",
    b"[]",
    b"\xff\0",
    b'{"evaluations": [{"step": 1, "name": 2, "of": 3, "values": 4}]}',
    b'{"config": {"a": [[1], {"b": 2}], "c": {}}, "start": {"images": "x", "total_steps": [], "said_of_data": 3}, "genuine": {}}',
)


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_leave_the_rest(tmp_path, undrawn, content):
    run = folders.run(tmp_path / "run")
    (run / "hard-pairs-test.json").write_text(json.dumps({"of": OF, "step": 100, "images": 300}))
    assert not run_files.read(str(run), "run").missing
    for name in NAMES:
        whole = (run / name).read_bytes()
        (run / name).write_bytes(content)
        found = run_files.read(str(run), "run")
        assert found.evaluations["test"][-1].values["eer"] == folders.report(1).eer
        assert found.missing or (name == "run.json" and found.config)
        (run / name).write_bytes(whole)
    for name in NAMES:
        (run / name).write_bytes(content)
    seen = page(run, out=tmp_path / "out.html")
    assert f"{folders.report(1).eer:.4f}" in seen.text and "What is not here" in seen.text


def test_a_row_that_is_not_whole_is_missed(tmp_path):
    """The other rows are, so the file as a whole tells nothing."""
    run = folders.run(tmp_path / "run")
    rows = json.loads((run / "evaluations.json").read_text())["evaluations"]
    (run / "evaluations.json").write_text(json.dumps({"evaluations": [rows[0], {"step": 100}]}))
    found = run_files.read(str(run), "run")
    assert found.evaluations["test"][-1].values["eer"] == folders.report(1).eer
    assert "There is no whole evaluations.json" in found.missing[0]


def test_numbers_that_cannot_be_drawn_are_damage(tmp_path):
    run = folders.run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(metrics_line(10**299))
    rows = json.loads((run / "evaluations.json").read_text())["evaluations"]
    rows[1]["intervals"]["eer"] = [-1e308, 1e308]
    (run / "evaluations.json").write_text(json.dumps({"evaluations": rows}))
    found = run_files.read(str(run), "run")
    assert found.metrics.step == 100 and found.metrics.damaged == 1
    assert not found.evaluations["test"][-1].intervals and "There is no whole evaluations.json" in found.missing[1]


def test_what_a_run_gave_up_is_left_out(tmp_path, undrawn):
    """It went back to step 50, and metrics.jsonl is cut there. Before, the set of step 10 was another one."""
    run = folders.run(tmp_path / "run", reports={step: folders.report(step) for step in (10, 40, 100)})
    rows = json.loads((run / "evaluations.json").read_text())["evaluations"]
    rows[0]["of"] = OF | {"labels": "other"}
    (run / "evaluations.json").write_text(json.dumps({"evaluations": rows}))
    (run / "hard-pairs-test.json").write_text(json.dumps({"of": OF, "step": 100, "images": 300}))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] <= 50))
    found = run_files.read(str(run), "run")
    assert [one.step for one in found.evaluations["test"]] == [40] and not found.pairs
    seen = page(run, out=tmp_path / "out.html")
    assert f"{folders.report(40).eer:.4f}" in seen.text and f"{folders.report(100).eer:.4f}" not in seen.text
    assert "Evaluations of steps beyond 50 are left out (1)" in seen.text and "of another set of that name are left out (1)" in seen.text


def test_results_of_eval_are_added_to_their_run(tmp_path, undrawn):
    runs = folders.run(tmp_path / "a"), folders.run(tmp_path / "b")
    groups = {"men": folders.report(4)}
    for run, seed in zip(runs, (1, 2), strict=True):
        one = folders.report(seed, groups=groups)
        of = {"path": "lfw.bin", "images": 7}
        evaluated = {"checkpoint": str(run / "checkpoints/step-00000100"), "step": 100, "ema": False, "name": "lfw", "of": of}
        (tmp_path / f"{run.name}.json").write_text(json.dumps({**one.as_dict(), "curve": _curve(one), "evaluated": evaluated}))
    seen = page(*runs, out=tmp_path / "out.html", more=[str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "Evaluation: lfw" in seen.text and f"{folders.report(2).eer:.4f}" in seen.text
    assert f"{folders.report(4).intervals['eer'][0]:.4f}" in seen.text, "of a group"
    assert "One threshold for all sets" in seen.text
    before = sorted(os.listdir(runs[0]))
    with pytest.raises(ValueError, match="is of none of the runs named: name its run too"):
        page(runs[0], out=tmp_path / "out.html", more=[str(tmp_path / "b.json")])
    for content, said in (
        ("", "c.json is empty"),
        ("{}", "is not what `protoshard eval"),
        ("x", "is not what"),
        (json.dumps({"evaluated": {"checkpoint": f"{runs[0]}/c"}}), "is damaged"),
    ):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            page(runs[0], out=tmp_path / "out.html", more=[str(tmp_path / "c.json")])
    assert sorted(os.listdir(runs[0])) == before, "nothing is written into a run's folder"


def test_only_pages_of_ours_are_written_over(tmp_path, undrawn):
    run, out = folders.run(tmp_path / "a"), tmp_path / "out.html"
    page(run, out=out)
    page(run, out=out)
    out.write_text("<html>a diary")
    with pytest.raises(ValueError, match="is there already, and no page of protoshard report"):
        page(run, out=out)
    assert out.read_text() == "<html>a diary"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "nothing does not exist; give the folder of a run"),
        (["file.txt"], "file.txt is no folder; give the folder of a run"),
        (["other"], "other is no run's folder: it has none of run.json, metrics.jsonl"),
        (["run", "./run"], "./run is named twice"),
        (["s3://bucket/run"], "is an address; copy the run's folder here first"),
        (["run", "--out", "page.pdf"], "give it a name that ends in .html or .htm"),
        (["run", "--out", "no/page.html"], "there is no folder"),
        (["run", "--add", "no.json"], "no.json cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders.run(tmp_path / "run", reports={})
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "other" / "x").mkdir(parents=True)
    assert main(["report", *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in told
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_report_html_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders.run(tmp_path / "run")
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out.startswith("report.html: 0.")
    assert (tmp_path / "report.html").stat().st_size > 1e5 and not list(tmp_path.glob("*.tmp"))


def test_labels_tell_runs_apart(tmp_path):
    assert labels([f"{tmp_path}/x/run", f"{tmp_path}/y/run", f"{tmp_path}/other/"]) == ["x/run", "y/run", "other"]
