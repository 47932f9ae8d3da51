"""Checkpoints that know neither the engine nor the number of ranks: written beside the training, verified, complete or not there at all."""

from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.folder import complete, locate, marks, newest, supersede
from pipeline.checkpoint.manifest import DamagedError
from pipeline.checkpoint.parts import Held, Part, Saved, Without, rows, whole
from pipeline.checkpoint.reading import Checkpoint, open_checkpoint
from pipeline.checkpoint.saving import NotFiniteError, OwnerError, Saver, save
from pipeline.checkpoint.stores import MANIFEST, store_of

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointConfig",
    "DamagedError",
    "Held",
    "NotFiniteError",
    "OwnerError",
    "Part",
    "Saved",
    "Saver",
    "Without",
    "complete",
    "locate",
    "marks",
    "newest",
    "open_checkpoint",
    "rows",
    "save",
    "store_of",
    "supersede",
    "whole",
]
