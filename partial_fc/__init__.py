"""The model-parallel classifier: usable alone, in any training loop. Imports nothing from the other folders."""

from partial_fc import losses
from partial_fc.classifier import PartialFC
from partial_fc.optimizers import RowSGD
from partial_fc.similarity import Statistics, similarity_statistics

__all__ = ["PartialFC", "RowSGD", "Statistics", "losses", "similarity_statistics"]
