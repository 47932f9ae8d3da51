"""What a user runs: recipes, training, checkpoints, evaluation and the command line."""

from importlib.metadata import PackageNotFoundError, version

from dali_loaders import renamed

try:
    __version__ = version("protoshard")
except PackageNotFoundError:  # a checkout that was put on the path without being installed
    __version__ = "unknown"

renamed.modules(
    {
        "pipeline.insightface": "pipeline.interop.insightface",
        "pipeline.plain_config": "pipeline.interop.plain_config",
        "pipeline.evaluation.checkpointed": "pipeline.evaluation.evaluate_checkpoint",
    }
)
