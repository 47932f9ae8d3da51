"""Looks at every image of a data set before it costs a training run, says what is wrong with it, and writes it without that."""

from dali_loaders.checking.findings import Findings, look
from dali_loaders.checking.report import CheckReport, check

__all__ = ["CheckReport", "Findings", "check", "look"]
