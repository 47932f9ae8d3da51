"""Figures draw what the report says, and are written as PNG files."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.figures import det_figure, roc_figure, save_png, score_figure


def report(noise: float, identities: int = 20):
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(identities), 4)
    centres = torch.randn(identities, 8, generator=generator)
    return all_pairs(centres[labels] + noise * torch.randn(len(labels), 8, generator=generator), labels)


def test_roc_curves_carry_their_eer_and_end_at_one():
    reports = {"before": report(5.0), "after": report(0.5)}
    axes = roc_figure(reports, "Faces").axes[0]
    assert (axes.get_title(), axes.get_xscale(), axes.get_xlim()) == ("Faces", "log", (1e-4, 1.0))
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    for name, of_name in reports.items():
        points = curves[f"{name} (EER {of_name.eer:.2%})"]
        assert points[0, 0] == pytest.approx(1 / of_name.impostor_pairs)
        assert points[-1].tolist() == [1.0, 1.0]
        assert {tuple(point) for point in points[1:]} <= set(zip(*of_name.roc, strict=True))


def test_det_curves_are_the_roc_s_errors_on_two_logarithmic_axes():
    reports = {"before": report(5.0), "after": report(0.5)}
    axes = det_figure(reports, "Faces").axes[0]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlim()) == ("log", "log", (1e-4, 1.0))
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    for name, of_name in reports.items():
        points = curves[f"{name} (EER {of_name.eer:.2%})"]
        assert {tuple(point) for point in points[1:]} <= {(far, 1 - tar) for far, tar in zip(*of_name.roc, strict=True)}
        assert (points[:, 1] > 0).all()


def test_a_separated_set_has_figures_too(tmp_path):
    for draw in (roc_figure, det_figure):
        save_png(draw({"perfect": report(0.0)}, "Perfect"), tmp_path / "figure.png")


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_score_densities_have_area_one(noise):
    axes = score_figure(report(noise), "Cosines").axes[0]
    for patch in axes.patches:
        values, edges, _ = patch.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(1.0)


def test_png_is_written_into_a_new_folder(tmp_path):
    save_png(roc_figure({"one": report(1.0)}, "One"), tmp_path / "figures" / "roc.png")
    assert (tmp_path / "figures" / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_unwritable_path_ends_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the figure cannot be written"):
        save_png(roc_figure({"one": report(1.0)}, "One"), tmp_path / "file" / "roc.png")


def test_names_that_matplotlib_would_read_otherwise(tmp_path):
    """Of sets and runs, which may have any: $...$ is mathematics to it, and a label that begins with _ stands for none."""
    named = {"_a $x{$": report(0.5)}
    for draw in (roc_figure, det_figure):
        figure = draw(named, "$b{$")
        save_png(figure, tmp_path / "figure.png")
        assert figure.axes[0].get_legend().get_texts()[0].get_text().startswith("_a $x{$ (EER")
    save_png(score_figure(named["_a $x{$"], "$b{$"), tmp_path / "figure.png")
