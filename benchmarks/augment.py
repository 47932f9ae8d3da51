"""What each augmentation costs on a CPU, as a multiple of decoding and normalising alone: python -m benchmarks.augment

Both decode the same batch of drawn faces in turn. The least processor time of each counts, which other programs hardly change."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dali_loaders import AugmentConfig, open_source
from dali_loaders.augment import augment_arguments
from dali_loaders.decode import Decoder
from dali_loaders.faces import FacesConfig, write_faces

SIZE, BATCH, ROUNDS = 112, 128, 25
PLAIN = AugmentConfig(flip=False)
# The options that make a change, and the one that is its probability.
CHANGES: dict[str, tuple[AugmentConfig, str]] = {
    "flip": (AugmentConfig(), ""),
    "rotate, zoom, shift": (replace(PLAIN, rotate=10, zoom=0.1, shift=0.1), "geometry"),
    "brightness, contrast": (replace(PLAIN, brightness=0.5, contrast=0.5), "colour"),
    "saturation, hue": (replace(PLAIN, saturation=0.5, hue=20), "colour"),
    "crop": (PLAIN, "crop"),
    "crop, crop_resize=false": (replace(PLAIN, crop_resize=False), "crop"),
    "mask": (PLAIN, "mask"),
    "cutout": (PLAIN, "cutout"),
    "blur": (PLAIN, "blur"),
    "low_resolution": (PLAIN, "low_resolution"),
    "grey": (PLAIN, "grey"),
    "jpeg": (PLAIN, "jpeg"),
    "adaface": (AugmentConfig.named("adaface"), ""),
}


def ratio(encoded: list[bytes], config: AugmentConfig) -> float:
    """Processor time of a batch with this augmentation, divided by that without any."""
    decode = [Decoder(SIZE, len(encoded), 1, torch.device("cpu")) for _ in range(2)]
    arguments = [augment_arguments(chosen, SIZE, 0, np.arange(len(encoded))) for chosen in (config, PLAIN)]
    seconds = [float("inf")] * 2
    for _ in range(ROUNDS):
        for side in range(2):
            start = time.process_time()
            decode[side](encoded, arguments[side])
            seconds[side] = min(seconds[side], time.process_time() - start)
    return seconds[0] / seconds[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "faces.tar")
        write_faces(path, FacesConfig(identities=BATCH // 4, images_per_identity=4, size=SIZE))
        source = open_source(path)
        encoded = [bytes(source.read(index)) for index in range(BATCH)]
    print("| options | probability 1 | 0.2 |\n|---|---|---|")
    for name, (config, probability) in CHANGES.items():
        options: list[dict[str, Any]] = [{probability: 1.0}, {probability: 0.2}] if probability else [{}]
        ratios = [f"{ratio(encoded, replace(config, **option)):.1f}" for option in options]
        print(f"| {name} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
