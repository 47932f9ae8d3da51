"""Hard pairs against all pairs by brute force; sheets and cloud of a set with an image that cannot be read."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import tarfile

import cv2
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from dali_loaders.config import DataConfig
from dali_loaders.sources import open_source
from pipeline.evaluation import sheets
from pipeline.monitor import Monitor
from tests.pipeline.runs import faces


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 700), identities=st.integers(1, 40), seed=st.integers(0, 99))
def test_hard_pairs_are_the_hardest_of_all(n, identities, seed):
    rng = np.random.default_rng(seed)
    labels_n = rng.integers(0, identities, n)
    vectors_nD = normalize(torch.from_numpy(rng.standard_normal((n, 8))).float())
    cosines = vectors_nD.double().numpy() @ vectors_nD.double().numpy().T
    rows, columns = np.triu_indices(n, 1)
    is_genuine = labels_n[rows] == labels_n[columns]
    for pairs, kind, sign in zip(sheets.hardest_pairs(vectors_nD, labels_n), (is_genuine, ~is_genuine), (1, -1), strict=True):
        assert bool(pairs) == bool(kind.any()) and len(pairs) <= sheets.PAIRS
        if not pairs:
            continue
        hardest = (sign * cosines[rows[kind], columns[kind]]).min()
        assert abs(sign * pairs[0].cosine - hardest) < 1e-6
        used = list(itertools.chain.from_iterable(pair[:2] for pair in pairs))
        assert len(set(used)) == len(used), "no image stands in two of them"
        for pair in pairs:
            assert pair.first < pair.second and (labels_n[pair.first] == labels_n[pair.second]) == (sign == 1)
            assert abs(pair.cosine - cosines[pair.first, pair.second]) < 1e-6
        assert [sign * pair.cosine for pair in pairs] == sorted(sign * pair.cosine for pair in pairs)


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 20), min_size=1, max_size=100), most=st.integers(1, 120))
def test_whole_identities_are_chosen(labels, most):
    labels_n = np.array(labels)
    chosen = sheets.some_identities(labels_n, most)
    assert len(chosen) <= most and (most < len(labels) or len(chosen) == len(labels))
    for label in set(labels_n[chosen].tolist()):
        assert (labels_n[chosen] == label).sum() == (labels_n == label).sum()


class Told(Monitor):
    def __init__(self, folder):
        super().__init__(folder, 10, console=False)
        self.told = {}

    def figure(self, step, name, figure):
        self.told[name] = [text.get_text() for text in figure.axes[0].texts]

    def points(self, step, name, vectors, labels, images):
        self.told[name] = vectors, labels, images


def test_what_the_monitor_is_told(tmp_path):
    source = open_source(faces(str(tmp_path)))
    index_n = np.delete(np.arange(len(source)), 3)  # an image that could not be read
    embeddings_nD = torch.randn(len(index_n), 16, generator=torch.Generator().manual_seed(0))
    monitor = Told(tmp_path / "run")
    kept = sheets.show(monitor, 10, "test", source, DataConfig(image_size=32, threads=1), embeddings_nD, index_n)
    vectors, labels, images = monitor.told["test"]
    assert vectors.shape == (77, 16) and images.shape == (77, 32, 32, 3) and labels[4] == source.identities[source.labels[5]]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert images.reshape(77, -1).std(axis=1).min() > 5, "pictures, and none black"
    assert {"evaluation/test/hard_genuine_pairs", "evaluation/test/hard_impostor_pairs"} < monitor.told.keys()
    first = monitor.told["evaluation/test/hard_genuine_pairs"][0]
    assert first.split("  ")[1].split(" / ")[0] == first.split(" / ")[1]
    assert (kept["step"], kept["name"], kept["images"]) == (10, "test", 77)
    assert [f"{pair['cosine']:.3f}" for pair in kept["genuine"]] == [
        text.split()[0] for text in monitor.told["evaluation/test/hard_genuine_pairs"]
    ]
    jpeg = np.frombuffer(base64.b64decode(kept["impostor"][0]["jpeg"]), np.uint8)
    assert cv2.imdecode(jpeg, cv2.IMREAD_COLOR).shape == (32, 66, 3)
    sheets.keep(tmp_path / "pairs.json", {"images": 78}, kept)
    assert json.loads((tmp_path / "pairs.json").read_text()) == {"of": {"images": 78}, **kept}


def test_names_that_look_like_mathematics(tmp_path):
    """matplotlib reads $...$ as such, and raises where it cannot."""
    with tarfile.open(faces(str(tmp_path))) as before, tarfile.open(tmp_path / "named.tar", "w") as after:
        for member in before:
            content = before.extractfile(member) if member.isfile() else None
            member.name = f"$a{{$ <b>{member.name}"
            after.addfile(member, content)
    source = open_source(str(tmp_path / "named.tar"))
    monitor = Monitor(tmp_path / "run", 10, console=False)
    embeddings_nD = torch.randn(len(source), 16, generator=torch.Generator().manual_seed(0))
    data = DataConfig(image_size=32, threads=1)
    kept = sheets.show(monitor, 10, "$b{$", source, data, embeddings_nD, np.arange(len(source)))
    monitor.close()
    assert kept["genuine"][0]["identities"][0].startswith("$a{$ <b>")
    shutil.rmtree(tmp_path / "run")
