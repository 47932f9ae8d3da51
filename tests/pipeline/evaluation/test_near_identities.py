"""Identities whose centres are near each other: against all cosines, and found again when one person has two names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from dali_loaders import open_source
from dali_loaders.config import DataConfig
from pipeline.evaluation import near_identities as module
from pipeline.evaluation.near_identities import class_centers, near_pairs


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 200), st.integers(1, 30), st.floats(0, 0.9))
def test_pairs_are_those_of_all_cosines(rows, block, most, above):
    centers_CD = normalize(torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)))
    cosines_CC = (centers_CD.double() @ centers_CD.double().T).triu(1)
    expected = sorted(cosines_CC[cosines_CC > above].tolist(), reverse=True)[:most]
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(module, "_BLOCK", block)
        cosines, pairs = near_pairs(centers_CD, above, most)
    assert cosines.tolist() == pytest.approx(expected, abs=1e-6)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert cosines_CC[pairs[:, 0], pairs[:, 1]].tolist() == pytest.approx(cosines.tolist(), abs=1e-6)


class MeanColor(nn.Module):
    """Features are the mean colour, about mid-grey."""

    def forward(self, images_bCHW: torch.Tensor) -> torch.Tensor:
        return images_bCHW.mean(dim=(2, 3))


@pytest.fixture
def colors(tmp_path):
    """Two identities are of one colour; one has no readable image."""
    cv2, np = pytest.importorskip("cv2"), pytest.importorskip("numpy")
    for name, color in {"blue": (250, 20, 20), "navy": (240, 30, 20), "red": (20, 20, 250), "green": (20, 250, 20)}.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for image in range(3):
            pixels = np.full((32, 32, 3), color, np.uint8) - image
            (tmp_path / "set" / name / f"{image}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    (tmp_path / "set" / "none").mkdir()
    (tmp_path / "set" / "none" / "0.png").write_bytes(b"")
    return tmp_path / "set"


@pytest.mark.parametrize("flip", [False, True])
def test_one_person_under_two_names(colors, flip):
    pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")
    source = open_source(str(colors))
    centers_CD = class_centers(MeanColor(), source, DataConfig(image_size=32, threads=1), 4, flip, torch.device("cpu"))
    assert centers_CD.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 0, 1], abs=1e-6)
    cosines, pairs = near_pairs(centers_CD, 0.9)
    assert [[source.identities[label] for label in pair] for pair in pairs.tolist()] == [["blue", "navy"]]
    assert cosines[0] > 0.99


def test_a_network_that_has_diverged_finds_no_pairs_silently(colors):
    pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

    class Exploded(MeanColor):
        def forward(self, images_bCHW: torch.Tensor) -> torch.Tensor:
            return super().forward(images_bCHW) * 1e30

    with pytest.raises(ValueError, match="features that are not finite for 4 identities"):
        class_centers(Exploded(), open_source(str(colors)), DataConfig(image_size=32, threads=1), 4, False, torch.device("cpu"))


def test_a_set_of_which_nothing_can_be_embedded(tmp_path):
    pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")
    (tmp_path / "set" / "none").mkdir(parents=True)
    (tmp_path / "set" / "none" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 images can be decoded"):
        class_centers(MeanColor(), open_source(str(tmp_path / "set")), DataConfig(image_size=32), 4, False, torch.device("cpu"))
