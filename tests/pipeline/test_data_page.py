"""The commands of docs/data.md, "In three commands", as they stand there, on small sets of the same forms."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from dali_loaders.faces import FacesConfig, write_faces
from dali_loaders.packing.alignment import TEMPLATE_52
from pipeline.cli import main

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
SMALL = "data.image_size=32 data.threads=2 backbone.name=small backbone.width=16 run.batch=8 run.epochs=0.5 run.log_every=50"
ON_A_CPU = "engine.device=cpu classifier.dtype=float32"


def blocks() -> list[tuple[str, list[list[str]]]]:
    """(the form that a block is about, its `protoshard` lines as words) of the section."""
    section = PAGE.read_text().partition("## In three commands")[2].partition("\n## ")[0]
    return [
        (block.partition("**")[0], [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("    protoshard")])
        for block in section.split("\n**")[1:]
    ]


def faces(folder: Path, first: int = 0) -> Path:
    write_faces(str(folder), FacesConfig(identities=8, images_per_identity=4, size=64, first_identity=first), workers=1)
    return folder


def insightface(folder: Path) -> None:
    """A folder as InsightFace ships one: without names of identities, with a property file and pair sets."""
    folder.mkdir(parents=True)
    assert main(["data", "pack", str(faces(Path("drawn"))), str(folder / "train.rec")]) == 0
    (folder / "train.identities.txt").unlink()
    (folder / "property").write_text("8,112,112")
    for name in ("lfw", "cfp_fp", "agedb_30"):
        assert main(["data", "pairs", "drawn", str(folder / f"{name}.bin"), "--folds", "2", "--pairs", "5"]) == 0


def webface() -> None:
    for number, identity in enumerate(sorted(faces(Path("drawn")).iterdir())):
        shutil.copytree(identity, Path("WebFace42M") / str(number % 2) / f"{number % 2}_0_{number:07}")


def hub() -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(faces(Path("drawn")).rglob("*.jpg"))
    labels = [file.parent.name for file in files]
    features = {"image": {"_type": "Image"}, "label": {"names": sorted(set(labels)), "_type": "ClassLabel"}}
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"image": images, "label": np.unique(labels, return_inverse=True)[1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    Path("hub/data").mkdir(parents=True)
    for shard in range(2):
        pq.write_table(table.slice(shard * 16, 16), f"hub/data/train-{shard:05}-of-00002.parquet")


def photos() -> None:
    """And the landmarks of each photo."""
    points = ",".join(f"{value:.1f}" for value in (TEMPLATE_52 * 64 / 112).ravel())
    files = [file for folder in (faces(Path("photos")), faces(Path("others"), 1000)) for file in sorted(folder.rglob("*.jpg"))]
    Path("points.csv").write_text("".join(f"{file},{points}\n" for file in files))


FORMS = {
    "MS1MV3": lambda: insightface(Path("data/ms1mv3")),
    "Glint360K": lambda: insightface(Path("data/glint360k")),
    "WebFace42M in shards": webface,
    "A Hugging Face export": hub,
    "Photos of your own": photos,
    "Whole photos": photos,
}


def test_every_form_is_there():
    assert [name for name, _ in blocks()] == list(FORMS)
    assert all(lines and lines[-1][1] == "train" for _, lines in blocks())


@pytest.mark.parametrize(("name", "lines"), blocks(), ids=[name for name, _ in blocks()])
def test_in_three_commands(name, lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    FORMS[name]()
    for _, *words in lines:
        if words[0] == "train":
            words = [*words, "--ranks", "1", "--set", *SMALL.split(), *ON_A_CPU.split()]
        assert main(words) == 0, words
    evaluated = "evaluation.data=" not in words and "evaluation.pairs=" not in words
    assert (" EER " in capsys.readouterr().out) == evaluated
