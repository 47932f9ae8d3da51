"""The classifier's own optimizers. Its parameters are sharded, so they stay outside the data-parallel engine and its optimizer."""

from partial_fc.optimizers.adamw import RowAdamW
from partial_fc.optimizers.row_optimizer import RowOptimizer
from partial_fc.optimizers.sgd import RowSGD

__all__ = ["RowAdamW", "RowOptimizer", "RowSGD"]
