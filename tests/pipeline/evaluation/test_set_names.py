"""Evaluation sets of a run have names of their own, whatever their paths."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders import DataConfig, open_source
from dali_loaders.faces import FacesConfig, write_faces
from pipeline.distributed import Place
from pipeline.evaluation import write_bin
from pipeline.evaluation.evaluator import EvaluationConfig, Evaluator
from pipeline.evaluation.set_names import AVERAGED, file_name, set_names
from pipeline.monitor import Monitor
from pipeline.summary import summary


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/test.tar", "data/lfw.bin"], ["test", "lfw"]),
        (["x/test.tar", "x/test.bin"], ["test.tar", "test.bin"]),
        (["a/lfw.bin", "b/lfw.bin"], ["a/lfw", "b/lfw"]),
        (["a/lfw", "b/lfw"], ["a/lfw", "b/lfw"]),
        (["a/b/lfw.bin", "c/b/lfw.bin", "d/cfp.bin"], ["a/b/lfw", "c/b/lfw", "cfp"]),
        (["a/lfw.bin", "a/LFW.tar"], ["lfw.bin", "LFW.tar"]),
        (["faces.tar", "faces_ema.tar"], ["faces.tar", "faces_ema.tar"]),
        (["people/", "v.1", "v.2"], ["people", "v.1", "v.2"]),
        (["a.rec,x/b.tar", "b.tar"], ["a+b", "b"]),
        (["x/test.tar", "x/test.bin", "y/test.tar.bin"], ["x/test", "test.bin", "test.tar.bin"]),
        (["a/lfw", "a/lfw_ema"], ["lfw#1", "lfw_ema#2"]),
    ],
)
def test_shortest_that_tell_apart(paths, names):
    assert set_names(paths) == names


parts = st.sampled_from(["a", "A", "lfw", "lfw.bin", "lfw_ema", "lfw.tar", "a+b", "a-b", "a,b", "\udcd5"])


@settings(deadline=None)
@given(st.lists(st.lists(parts, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6, unique_by=str.casefold))
def test_results_never_share_a_name(paths):
    names = set_names(paths)
    results = [*names, *(name + AVERAGED for name in names)]
    assert len(set(results)) == len(results)
    assert len({file_name(name).casefold() for name in results}) == len(results)
    for name in results:
        name.encode()
        assert "/" not in file_name(name)


def test_one_set_is_not_evaluated_twice(tmp_path):
    (tmp_path / "lfw.bin").write_bytes(b"")
    os.symlink(tmp_path / "lfw.bin", tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"lfw\.bin and .*other\.bin are the same set"):
        set_names([str(tmp_path / "lfw.bin"), str(tmp_path / "other.bin")])
    with pytest.raises(ValueError, match="named twice"):
        set_names(["none.bin", "none.bin"])


@pytest.fixture
def sets(tmp_path):
    """test.tar and test.bin of other faces."""
    write_faces(str(tmp_path / "test.tar"), FacesConfig(identities=4, images_per_identity=3, size=16), workers=1)
    source = open_source(str(tmp_path / "test.tar"))
    images = [source.read(at) for at in (0, 1, 0, 3, 3, 4, 1, 7)]
    write_bin(str(tmp_path / "test.bin"), images, [True, False, True, False])
    return tmp_path


def evaluator(folder, pairs=("test.bin",), data="test.tar"):
    config = EvaluationConfig(data=str(folder / data), pairs=tuple(str(folder / name) for name in pairs))
    place = Place(0, 1, torch.device("cpu"))
    return Evaluator(config, DataConfig(image_size=16, threads=1), place, str(folder / "run"))


def test_results_of_two_sets_stay_apart(sets):
    monitor = Monitor(sets / "run", 2)
    runner = evaluator(sets)
    runner.run(torch.nn.Flatten(), 1, monitor)
    runner.run(torch.nn.Flatten(), 1, monitor, averaged=True)
    monitor.close()
    rows = [json.loads(line) for line in (sets / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {key.rpartition("/")[0] for row in rows for key in row if key.endswith("/eer")} == {
        "test.tar", "test.bin", "test.tar_ema", "test.bin_ema",
    }  # fmt: skip
    assert sorted(name for name in os.listdir(sets / "run") if name.startswith("roc-")) == [
        "roc-test.bin-00000001.png",
        "roc-test.bin_ema-00000001.png",
        "roc-test.tar-00000001.png",
        "roc-test.tar_ema-00000001.png",
    ]
    assert "->" not in summary(str(sets / "run"))


def test_another_set_under_the_same_name_is_not_compared(tmp_path):
    rows = [{"step": 1, "a/test/eer": 0.1, "a/test/images": 8}, {"step": 2, "a/test/eer": 0.4, "a/test/images": 9}]
    rows += [{"step": 3, "a/test/eer": 0.3, "a/test/images": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "0.4000 at step 2 -> 0.3000 at step 3" in summary(str(tmp_path))


def test_groups_of_a_set_are_no_sets(tmp_path):
    """Nor those of a set whose name looks like the place of the thresholds."""
    for at, name in enumerate(("rfw", "evaluation")):
        numbers = {"eer": 0.1, "accuracy": 0.9, "threshold": 0.2, "African/eer": 0.3, "African/threshold": 0.4, "African/accuracy": 0.7}
        line = {"step": 1, **{f"{name}/{key}": value for key, value in numbers.items()}, f"evaluation/{name}/threshold": 0.2}
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert [text.split()[:2] for text in summary(str(folder)).splitlines() if text] == [[name, "EER"], [name, "accuracy"]]


def test_a_set_that_cannot_be_read_is_refused_at_the_start(sets):
    (sets / "cut.bin").write_bytes((sets / "test.bin").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"evaluation\.pairs: .*cut\.bin: it cannot be read .*expected .* --set evaluation\.pairs="):
        evaluator(sets, pairs=("cut.bin",))
    with pytest.raises(ValueError, match=r"evaluation\.data: .*gone\.tar does not exist"):
        evaluator(sets, data="gone.tar")
