"""TensorBoard's files, read back by the code of its own plugins: named runs, groups, a first page, tables, the projector, options."""

from __future__ import annotations

import json
import math
import re

import matplotlib.figure
import numpy as np
import pytest
from google.protobuf import text_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.projector import projector_plugin
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from pipeline.monitor import Monitor, MonitorConfig
from pipeline.monitor.names import FIRST_PAGE, GROUPED, grouped
from pipeline.monitor.pictures import pixels_of, png_of, size_of, tiled

LINE = {
    **dict.fromkeys(GROUPED, 1.2345678901234),
    **dict.fromkeys(("prototypes/norm", "memory/host_gib", "memory/gpu_gib", "memory/gpu_reserved_gib"), 1.2345678901234),
}
LINE = {name: value for name, value in LINE.items() if name != "threshold"}


def events_of(folder, name="run"):
    return EventAccumulator(str(folder / "tensorboard" / name)).Reload()


@pytest.fixture
def monitor(tmp_path):
    made = Monitor(tmp_path / "run", total_steps=10, console=False, options={"run.batch": 64.0, "loss": "cosface", "data.train": "\udcd5"})
    yield made
    made.close()


def test_the_run_has_the_name_of_its_folder_and_keeps_it(tmp_path):
    for folder, first in ((tmp_path / "run", 0), (tmp_path / "renamed", 3)):
        if first:
            (tmp_path / "run").rename(folder)
        monitor = Monitor(folder, total_steps=5, console=False, first_step=first)
        monitor.scalars(first, {"loss": 1.0})
        monitor.close()
        (folder / "tensorboard" / ".notebook").mkdir(exist_ok=True)  # somebody else's
    assert sorted(entry.name for entry in (tmp_path / "renamed" / "tensorboard").iterdir()) == [".notebook", "run"]
    assert [event.step for event in events_of(tmp_path / "renamed").Scalars("train/loss")] == [0, 3]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", "train/loss"),
        ("hardest_non_target_cosine", "cosines/hardest_non_target"),
        ("loss/temperature", "learned/temperature"),
        ("uss_threshold", "cosines/uss_threshold"),
        ("memory/host_gib", "memory/host_gib"),
        ("something_new", "train/something_new"),
    ],
)
def test_every_figure_has_a_group(name, shown):
    assert grouped(name) == shown


def test_each_chart_of_the_first_page_finds_its_curves_and_no_others(monitor, tmp_path):
    """Those that a name begins with would be found too: TensorBoard calls `re.match`."""
    monitor.scalars(1, LINE)
    others = {"threshold_at_far/1e-3": 0.4, "rank10": 1.0, "fnmr_at_fmr/1e-3": 0.5, "accuracy_spread": 0.01}
    monitor.evaluation(1, "test", {"eer": 0.1, "tar_at_far/1e-3": 0.5, "rank1": 0.9, "accuracy": 0.9, "images": 400, **others}, 0.3)
    monitor.close()
    events = events_of(tmp_path / "run")
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(FIRST_PAGE)
    tags = events.Tags()["scalars"]
    found = {
        chart.title: {tag for tag in tags if any(re.match(pattern, tag) for pattern in chart.multiline.tag)}
        for category in layout.category
        for chart in category.chart
    }
    assert all(found.values()), found
    assert found["loss"] == {"train/loss"} and "train/loss_scale" in tags
    assert found["best threshold"] == {"evaluation/test/threshold"}
    assert found["rank-1 and accuracy"] == {"evaluation/test/rank1", "evaluation/test/accuracy"}
    assert found["TAR at FAR"] == {"evaluation/test/tar_at_far/1e-3"}


def test_sizes_of_a_set_are_in_a_table_and_no_curves(monitor, tmp_path):
    values = {"eer": 0.125, "images": 4000, "identities": 40, "tar_at_far/1e-3": 0.5}
    monitor.evaluation(7, "test", values, 0.25)
    monitor.close()
    events = events_of(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == {"evaluation/test/eer", "evaluation/test/tar_at_far/1e-3", "evaluation/test/threshold"}
    table = events.Tensors("evaluation/test/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| images | 4,000 |" in table and "| eer | 0.125 |" in table and "step 7" in table
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert {name: line[f"test/{name}"] for name in values} == values and line["evaluation/test/threshold"] == 0.25


def test_the_projector_finds_vectors_labels_and_thumbnails(monitor, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 4, 4, 3), 50, np.uint8)
    for step in (3, 9):  # the later ones replace the earlier ones
        monitor.points(step, "test", vectors + step, ["anna", "b\tc\n", "ø", "d", "e"], images)
    monitor.points(9, "a/test", vectors, list("abcde"), images)
    monitor.close()
    folder = tmp_path / "run" / "tensorboard" / "run"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [entry.tensor_name for entry in config.embeddings] == ["a/test at step 9", "test at step 9"]
    entry = config.embeddings[1]
    read = projector_plugin._read_tensor_binary_file(str(folder / entry.tensor_path), list(entry.tensor_shape))
    np.testing.assert_array_equal(np.asarray(read).reshape(5, 8), vectors + 9)
    assert (folder / entry.metadata_path).read_text() == "anna\nb c\nø\nd\ne\n"
    sheet = pixels_of((folder / entry.sprite.image_path).read_bytes())
    assert sheet.shape == (12, 12, 3) and list(entry.sprite.single_image_dim) == [4, 4]
    size = sheet.shape[0] // 4
    for number, image in enumerate(images):  # where the projector's shader looks for them: by rows, which must be as many as columns
        row, column = number // size, number % size
        assert np.abs(sheet[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean() - image.mean()) < 8


def test_options_and_last_figures_are_one_row(monitor, tmp_path):
    monitor.outcome({"test/eer": 0.1, "test/images": 400})
    monitor.close()
    content = events_of(tmp_path / "run").summary_metadata["_hparams_/session_start_info"].plugin_data.content
    row = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert row.hparams["run.batch"].number_value == 64 and row.hparams["loss"].string_value == "cosface"
    assert row.hparams["data.train"].string_value == r"\udcd5", "UTF-8 has no such name"
    content = events_of(tmp_path / "run").summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["evaluation/test/eer"]


def test_a_run_that_goes_on_with_other_options_shows_the_last_ones(tmp_path):
    """Readers keep the first that they find in a run, so there must be no others."""
    for epochs, first in ((8.0, 0), (16.0, 5)):
        monitor = Monitor(tmp_path / "run", 10, console=False, first_step=first, options={"run.epochs": epochs})
        for step in range(first, 10):
            monitor.scalars(step, {"loss": epochs})
        monitor.outcome({"test/eer": 0.1})
        monitor.outcome({"test/eer": 0.1})
        monitor.close()
    events = events_of(tmp_path / "run")
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams["run.epochs"].number_value == 16
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, 8.0 if step < 5 else 16.0) for step in range(10)
    ]
    assert len(list((tmp_path / "run" / "tensorboard" / "run").iterdir())) == 3


def test_pictures(monitor, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    monitor.image(1, "sheet", image)
    figure = matplotlib.figure.Figure(figsize=(2, 1))
    monitor.figure(1, "roc", figure)
    monitor.close()
    events = events_of(tmp_path / "run")
    shown = events.Images("sheet")[0]
    assert (shown.width, shown.height) == (30, 20) == size_of(png_of(image))
    np.testing.assert_array_equal(pixels_of(shown.encoded_image_string), image)
    assert (events.Images("roc")[0].width, events.Images("roc")[0].height) == (200, 100)


def test_tiles():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 2, 3, 3), np.uint8)
    sheet = tiled(images, 3)
    assert sheet.shape == (4, 9, 3)
    assert sheet[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 0]]


def test_a_million_steps_write_less_than_100_mb(tmp_path):
    """A line every 20 steps, with all figures that a run can have: docs/monitoring.md states the bytes."""
    monitor = Monitor(tmp_path / "run", total_steps=1_000_000, console=False)
    sizes = []
    for lines in (10, 210):
        for step in range(len(sizes) and 10, lines):
            monitor.scalars(1_000_000 + step, {name: value + math.sqrt(step) for name, value in LINE.items()})
        sizes.append([path.stat().st_size for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()])
    monitor.close()
    metrics, events = ((after - before) / 200 * 50_000 for before, after in zip(*sizes, strict=True))
    print(f"metrics.jsonl {metrics / 1e6:.0f} MB, TensorBoard {events / 1e6:.0f} MB")
    assert metrics < 45e6 and events < 45e6


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"writers": ("tensorbord",)}, "monitor.writers has 'tensorbord', but must be one or several of tensorboard, wandb"),
        ({"writers": ("wandb", "wandb")}, "name each once"),
        ({"images": -1}, "monitor.images is -1, but must be from 0"),
    ],
)
def test_bad_options(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        MonitorConfig(**values)


def test_no_writer_but_metrics(tmp_path):
    monitor = Monitor(tmp_path / "run", 1, console=False, config=MonitorConfig(writers=()))
    monitor.scalars(0, {"loss": 1.0})
    monitor.figure(0, "roc", None)  # it is not drawn
    monitor.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
