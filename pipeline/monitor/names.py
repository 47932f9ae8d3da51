"""What the figures of metrics.jsonl are called where they are shown in groups: a name's first part is its group."""

from __future__ import annotations

# metrics.jsonl keeps the short names, which scripts read. What is not listed has a group in its name already.
GROUPED = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "epoch": "train/epoch",
    "skipped_steps": "train/skipped_steps",
    "rollbacks": "train/rollbacks",
    "loss_scale": "train/loss_scale",
    "target_cosine": "cosines/target",
    "hardest_non_target_cosine": "cosines/hardest_non_target",
    "threshold": "cosines/threshold",
    "images_per_second": "data/images_per_second",
    "wait_share": "data/wait_share",
    "skipped_images": "data/skipped_images",
    "save_stall": "data/save_stall",
}
# The first page: rows of three charts, each with the names of its curves, as regular expressions of whole names.
FIRST_PAGE = {
    "How the run is": {
        "loss": ["train/loss"],
        "error on other identities (EER)": ["evaluation/.*/eer"],
        "cosines: target, hardest other, between prototypes": [
            "cosines/target",
            "cosines/hardest_non_target",
            "prototypes/nearest_cosine",
        ],
    },
    "On other identities": {
        "TAR at FAR": ["evaluation/.*/tar_at_far/.*"],
        "rank-1 and accuracy": ["evaluation/.*/(rank1|accuracy)"],
        "best threshold": ["evaluation/.*/threshold", "cosines/.*threshold"],
    },
    "How fast it is": {
        "images per second": ["data/images_per_second"],
        "share of time that waits for data": ["data/wait_share"],
        "memory, GiB": ["memory/.*"],
    },
    "What went wrong": {
        "gradient norm": ["train/gradient_norm"],
        "steps and images left out": ["train/skipped_steps", "data/skipped_images", "train/rollbacks"],
        "learning rate": ["train/learning_rate"],
    },
}


def grouped(name: str) -> str:
    """ "loss" -> "train/loss". Thresholds that losses of a sum learn, such as "uss_threshold", are cosines; "loss/..." is "learned/..."."""
    if name in GROUPED:
        return GROUPED[name]
    if name.startswith("loss/"):
        return f"learned/{name.removeprefix('loss/')}"
    return name if "/" in name else f"cosines/{name}" if name.endswith(("threshold", "thresholds")) else f"train/{name}"


def of_set(set_name: str, figure: str) -> str:
    return f"evaluation/{set_name}/{figure}"
