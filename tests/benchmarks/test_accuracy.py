"""The batches of `protoshard bench accuracy` have the loss they are named for, and its errors are errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks import accuracy
from tests.partial_fc.oracle import margin_loss


@pytest.mark.parametrize("negatives", ["easy", "hard"])
@pytest.mark.parametrize("loss", accuracy.LOSSES)
def test_batches_have_the_loss_asked_for(loss, negatives):
    features, prototypes, labels = accuracy.batch_of(loss, negatives, 500, 12, 512)
    reached = margin_loss("cosface", features.double(), prototypes.double(), labels, accuracy.SCALE, accuracy.MARGIN)
    assert float(reached) == pytest.approx(loss, rel=1e-3)
    cosines = functional.normalize(features) @ functional.normalize(prototypes).T
    if negatives == "hard":
        assert ((cosines - accuracy.HARDEST).abs() < 1e-5).any(dim=1).all()
    assert features.norm(dim=1).std() > 0.05 and prototypes.norm(dim=1).std() > 0.05


def test_rows():
    rows = list(accuracy.rows(classes=300, batch=8, width=512))
    assert len(rows) == 8
    for row in rows:
        assert row["float32_features"] < 1e-4 and row["float32_prototypes"] < 1e-4
        assert row["dense_bfloat16_features"] > row["float32_features"]
        assert "relative error of feature and prototype gradients bfloat16" in accuracy.as_text(row)
    assert all(row["dense_bfloat16_features"] > 1e-2 for row in rows if row["loss"] < 1e-6)


def test_sizes_too_small_end_in_a_sentence():
    with pytest.raises(ValueError, match="must be at least 2, 1 and 4"):
        next(accuracy.rows(1, 8, 64))
    assert torch.is_grad_enabled()
