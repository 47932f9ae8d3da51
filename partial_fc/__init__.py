"""The model-parallel classifier, usable alone in any training loop. It imports nothing from the other folders."""

from importlib.metadata import PackageNotFoundError, version

from partial_fc import losses
from partial_fc.classifier import PartialFC
from partial_fc.columns import Columns, of_bank, of_classes, of_sampled, of_samples
from partial_fc.config import ClassifierConfig
from partial_fc.growing import copy_prototypes, grow, merge_identities
from partial_fc.loop import GradScaler, clip_grad_norm_, found_non_finite, keep_out_of_ddp
from partial_fc.maps import Map
from partial_fc.optimizers import RowAdamW, RowSGD
from partial_fc.pairs import pair_statistics
from partial_fc.similarity import Statistics, similarity_statistics
from partial_fc.statistics import LogSumExp, SoftplusSum, TopK

__all__ = [
    "ClassifierConfig", "Columns", "GradScaler", "LogSumExp", "Map", "PartialFC", "RowAdamW", "RowSGD", "SoftplusSum", "Statistics", "TopK",
    "clip_grad_norm_", "copy_prototypes", "found_non_finite", "grow", "keep_out_of_ddp", "losses", "merge_identities", "of_bank",
    "of_classes", "of_sampled", "of_samples", "pair_statistics", "similarity_statistics",
]  # fmt: skip

try:
    __version__ = version("protoshard")
except PackageNotFoundError:  # a checkout that was put on the path without being installed
    __version__ = "unknown"
