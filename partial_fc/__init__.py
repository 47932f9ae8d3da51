"""The model-parallel classifier: usable alone, in any training loop. Imports nothing from the other folders."""

from partial_fc import losses
from partial_fc.classifier import PartialFC
from partial_fc.growing import copy_prototypes, grow, merge_identities
from partial_fc.optimizers import RowAdamW, RowSGD
from partial_fc.similarity import Statistics, similarity_statistics

__all__ = [
    "PartialFC",
    "RowAdamW",
    "RowSGD",
    "Statistics",
    "copy_prototypes",
    "grow",
    "losses",
    "merge_identities",
    "similarity_statistics",
]
