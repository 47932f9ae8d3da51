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

ARCFACE = losses.build("arcface", scale=64.0, margin=0.5)
COSFACE = losses.build("cosface", scale=64.0, margin=0.4)
PAIRS = ("lfw", "cfp_fp", "agedb_30")


def ms1mv3_iresnet50_arcface_8gpu() -> TrainConfig:
    """launch/multinode.sh ms1mv3_iresnet50_arcface_8gpu --ranks-per-node 8

    93,431 identities, 5.2M images. Published for 8 x 128 images (configs/ms1mv3_r50.py): MFR-ALL 79.14, IJB-C 96.37 at FAR 1e-4.
    """
    return _large("ms1mv3", BackboneConfig("iresnet50"), ARCFACE, OptimizerConfig(lr=0.1), batch=1024)


def ms1mv3_mobilefacenet_arcface_8gpu() -> TrainConfig:
    """launch/multinode.sh ms1mv3_mobilefacenet_arcface_8gpu --ranks-per-node 8

    93,431 identities, 5.2M images. Published for 8 x 128 images (configs/ms1mv3_mbf.py): MFR-ALL 63.78, IJB-C 94.23 at FAR 1e-4.
    """
    return _large("ms1mv3", BackboneConfig("mobilefacenet"), ARCFACE, OptimizerConfig(lr=0.1, weight_decay=1e-4), batch=1024, epochs=40)


def glint360k_iresnet100_cosface_8gpu() -> TrainConfig:
    """launch/multinode.sh glint360k_iresnet100_cosface_8gpu --ranks-per-node 8

    360,232 identities, 17.1M images. Published for 8 x 128 images (configs/glint360k_r100.py): MFR-ALL 89.52, IJB-C 97.55 at FAR 1e-4.
    """
    return _large("glint360k", BackboneConfig("iresnet100"), COSFACE, OptimizerConfig(lr=0.1, weight_decay=1e-4), batch=1024)


def glint360k_mobilefacenet_cosface_8gpu() -> TrainConfig:
    """launch/multinode.sh glint360k_mobilefacenet_cosface_8gpu --ranks-per-node 8

    360,232 identities, 17.1M images. Published for 8 x 128 images (configs/glint360k_mbf.py): MFR-ALL 70.18, IJB-C 95.04 at FAR 1e-4.
    """
    return _large("glint360k", BackboneConfig("mobilefacenet"), COSFACE, OptimizerConfig(lr=0.1, weight_decay=1e-4), batch=1024)


def webface42m_iresnet100_cosface_32gpu() -> TrainConfig:
    """launch/multinode.sh webface42m_iresnet100_cosface_32gpu --hosts hosts.txt --ranks-per-node 8

    2,059,906 identities, 42.5M images. Published for 32 x 128 images (configs/wf42m_pfc02_r100_32gpus.py): MFR-ALL 96.57, IJB-C 97.83 at
    FAR 1e-4.
    """
    return _large(
        "webface42m", BackboneConfig("iresnet100"), COSFACE, OptimizerConfig(lr=0.4, warmup_epochs=2.0), batch=4096, sample_rate=0.2
    )


def webface42m_vit_t_64gpu() -> TrainConfig:
    """launch/multinode.sh webface42m_vit_t_64gpu --hosts hosts.txt --ranks-per-node 8

    2,059,906 identities, 42.5M images, CosFace. Published for 64 x 384 images (configs/wf42m_pfc03_40epoch_64gpu_vit_t.py): MFR-ALL 92.24,
    IJB-C 97.31 at FAR 1e-4.
    """
    return _vit(BackboneConfig("vit_t", drop_path=0.05, float32_attention=True))


def webface42m_vit_b_64gpu() -> TrainConfig:
    """launch/multinode.sh webface42m_vit_b_64gpu --hosts hosts.txt --ranks-per-node 8

    2,059,906 identities, 42.5M images, CosFace. Published for 64 x 384 images (configs/wf42m_pfc03_40epoch_64gpu_vit_b.py): MFR-ALL 97.42,
    IJB-C 97.90 at FAR 1e-4.
    """
    # Its network is called vit_b_dp005_mask_005, but arcface_torch masks 0.1 of the patches whenever that number is not 0.
    return _vit(BackboneConfig("vit_b", drop_path=0.05, mask_ratio=0.1, float32_attention=True, checkpoint_activations=True))


def _vit(backbone: BackboneConfig) -> TrainConfig:
    optimizer = OptimizerConfig("adamw", "adamw", lr=0.001, weight_decay=0.1, warmup_epochs=4.0)
    return _large("webface42m", backbone, COSFACE, optimizer, batch=64 * 384, epochs=40, sample_rate=0.3, pairs=())


def _large(
    folder: str,
    backbone: BackboneConfig,
    loss: losses.Loss,
    optimizer: OptimizerConfig,
    batch: int,
    epochs: int = 20,
    sample_rate: float = 1.0,
    pairs: tuple[str, ...] = PAIRS,
) -> TrainConfig:
    """engine.name=ddp: of an IResNet, DDP sends fewer bytes in fewer launches a step than ZeRO (counted, docs/numerics.md)."""
    return TrainConfig(
        run=RunConfig(batch=batch, epochs=epochs, log_every=50),
        data=DataConfig(train=find_data(f"{folder}/train.rec"), min_images=1),  # these sets are used whole
        backbone=backbone,
        classifier=ClassifierConfig(sample_rate, dtype="bfloat16"),  # which the Triton kernel needs
        loss=loss,
        optimizer=optimizer,
        engine=EngineConfig(name="ddp", device="cuda"),
        evaluation=EvaluationConfig(pairs=tuple(find_data(f"{folder}/{name}.bin") for name in pairs), every_epochs=1.0),
    )
