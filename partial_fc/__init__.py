"""The model-parallel classifier: usable alone, in any training loop. Imports nothing from the other folders."""

from partial_fc import losses
from partial_fc.classifier import PartialFC
from partial_fc.growing import copy_prototypes, grow, merge_identities
from partial_fc.maps import Map
from partial_fc.optimizers import RowAdamW, RowSGD
from partial_fc.pairs import pair_statistics
from partial_fc.similarity import Statistics, similarity_statistics

__all__ = [
    "Map",
    "PartialFC",
    "RowAdamW",
    "RowSGD",
    "Statistics",
    "copy_prototypes",
    "grow",
    "losses",
    "merge_identities",
    "pair_statistics",
    "similarity_statistics",
]
