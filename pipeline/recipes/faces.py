"""Recipes for the usual large face sets on GPUs, with the settings of arcface_torch's config files and of its script of 2022, of which the
published results in the docstrings are. On purpose other than there: bfloat16 for float16, evaluation once an epoch, a line of metrics
every 50 steps, the seed. None of them was run on a GPU yet."""

from __future__ import annotations

from dali_loaders.config import DataConfig
from partial_fc import losses
from partial_fc.classifier import ClassifierConfig
from pipeline.backbones import BackboneConfig
from pipeline.config import RunConfig, TrainConfig
from pipeline.engine import EngineConfig
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.recipes.data import find_data
from pipeline.schedule import OptimizerConfig


def ms1mv3_iresnet50_arcface_8gpu() -> TrainConfig:
    """launch/multinode.sh ms1mv3_iresnet50_arcface_8gpu --ranks-per-node 8

    93,431 identities, 5.2M images. Published for 8 x 128 images (configs/ms1mv3_r50.py): MFR-ALL 79.14, IJB-C 96.37 at FAR 1e-4.
    """
    return _large("ms1mv3", "iresnet50", losses.build("arcface", scale=64.0, margin=0.5), batch=1024)


def glint360k_iresnet100_cosface_8gpu() -> TrainConfig:
    """launch/multinode.sh glint360k_iresnet100_cosface_8gpu --ranks-per-node 8

    360,232 identities, 17.1M images. Published for 8 x 128 images (configs/glint360k_r100.py): MFR-ALL 89.52, IJB-C 97.55 at FAR 1e-4.
    """
    return _large("glint360k", "iresnet100", losses.build("cosface", scale=64.0, margin=0.4), batch=1024, weight_decay=1e-4)


def webface42m_iresnet100_cosface_32gpu() -> TrainConfig:
    """launch/multinode.sh webface42m_iresnet100_cosface_32gpu --hosts hosts.txt --ranks-per-node 8

    2,059,906 identities, 42.5M images. Published for 32 x 128 images (configs/wf42m_pfc02_r100_32gpus.py): MFR-ALL 96.57, IJB-C 97.83 at
    FAR 1e-4.
    """
    loss = losses.build("cosface", scale=64.0, margin=0.4)
    return _large("webface42m", "iresnet100", loss, batch=4096, warmup_epochs=2.0, sample_rate=0.2)


def _large(
    folder: str,
    backbone: str,
    loss: losses.Loss,
    batch: int,
    weight_decay: float = 5e-4,
    warmup_epochs: float = 0.0,
    sample_rate: float = 1.0,
) -> TrainConfig:
    """engine.name=ddp: of an IResNet, DDP sends fewer bytes in fewer launches a step than ZeRO (counted, docs/numerics.md)."""
    return TrainConfig(
        run=RunConfig(batch=batch, epochs=20, log_every=50),
        data=DataConfig(train=find_data(f"{folder}/train.rec"), min_images=1),  # these sets are used whole
        backbone=BackboneConfig(backbone, width=512),
        classifier=ClassifierConfig(sample_rate, dtype="bfloat16"),  # which the Triton kernel needs
        loss=loss,
        optimizer=OptimizerConfig(lr=0.1 * batch / 1024, weight_decay=weight_decay, warmup_epochs=warmup_epochs),
        engine=EngineConfig(name="ddp", device="cuda"),
        evaluation=EvaluationConfig(
            pairs=tuple(find_data(f"{folder}/{name}.bin") for name in ("lfw", "cfp_fp", "agedb_30")), every_epochs=1.0
        ),
    )
