"""Recipes for the usual large face sets on GPUs, with arcface_torch's settings: SGD, lr 0.1 per 1024 images, 128 images a GPU, 20 epochs.
None of them was run here: they hold its published results for comparison."""

from __future__ import annotations

from dali_loaders.config import DataConfig
from partial_fc import losses
from partial_fc.classifier import ClassifierConfig
from pipeline.backbones import BackboneConfig
from pipeline.config import RunConfig, TrainConfig
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.recipes.data import find_data
from pipeline.schedule import OptimizerConfig


def ms1mv3_iresnet50_arcface_8gpu() -> TrainConfig:
    """launch/multinode.sh ms1mv3_iresnet50_arcface_8gpu --ranks-per-node 8

    93,431 identities, 5.2M images. Published for arcface_torch: MFR-ALL 79.14, IJB-C 96.37 at 1e-4.
    """
    return _large("ms1mv3", "iresnet50", losses.build("arcface", scale=64.0, margin=0.5), batch=1024)


def glint360k_iresnet100_cosface_8gpu() -> TrainConfig:
    """launch/multinode.sh glint360k_iresnet100_cosface_8gpu --ranks-per-node 8

    360,232 identities, 17.1M images. Published for arcface_torch: MFR-ALL 89.52, IJB-C 97.55 at 1e-4.
    """
    return _large("glint360k", "iresnet100", losses.build("cosface", scale=64.0, margin=0.4), batch=1024)


def webface42m_iresnet100_cosface_32gpu() -> TrainConfig:
    """launch/multinode.sh webface42m_iresnet100_cosface_32gpu --hosts hosts.txt --ranks-per-node 8

    2,059,906 identities, 42.5M images. Published for arcface_torch at sample rate 0.2: MFR-ALL 96.27, IJB-C 97.70 at 1e-4.
    """
    return _large(
        "webface42m", "iresnet100", losses.build("cosface", scale=64.0, margin=0.4), batch=4096, warmup_epochs=1.0, sample_rate=0.2
    )


def _large(folder: str, backbone: str, loss: losses.Loss, batch: int, warmup_epochs: float = 0.0, sample_rate: float = 1.0) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(batch=batch, epochs=20, log_every=50),
        data=DataConfig(train=find_data(f"{folder}/train.rec")),
        backbone=BackboneConfig(backbone, width=512),
        classifier=ClassifierConfig(sample_rate),
        loss=loss,
        optimizer=OptimizerConfig(lr=0.1 * batch / 1024, warmup_epochs=warmup_epochs),
        evaluation=EvaluationConfig(
            pairs=tuple(find_data(f"{folder}/{name}.bin") for name in ("lfw", "cfp_fp", "agedb_30")), every_epochs=1.0
        ),
    )
