"""What `protoshard bench training` trains: one entry per row of the table in docs/experiments.md."""

from __future__ import annotations

BUDGET = (
    "run.batch=128",
    "run.epochs=30",
    "run.margin_warmup=0.33",
    "evaluation.at_start=false",
    "checkpoint.every_epochs=1000",
    "data.threads=1",
)
PAIRED = ("data.images_per_identity=2",)

# Settings that differ from the loss's defaults. They were chosen among CANDIDATES on identities held out of the training set.
ENTRIES: dict[str, tuple[str, ...]] = {
    "cosface": ("loss=cosface", "loss.scale=24", "loss.margin=0.2"),
    "cosface paired": ("loss=cosface", "loss.scale=24", "loss.margin=0.2", *PAIRED),
    "arcface": ("loss=arcface", "loss.scale=24", "loss.margin=0.5"),
    "sphereface2": ("loss=sphereface2", "loss.scale=24", "loss.margin=0.1"),
    "npt": ("loss=npt", "loss.margin=0.35", "loss.k=10"),
    "uce": ("loss=uce", "loss.scale=24", "loss.margin=0.2"),
    "unitsface": ("loss=unitsface", "loss.scale=24", "loss.margin=0.2", "loss.sample_margin=0.05", *PAIRED),
    "gce": ("loss=gce", "loss.scale=24", "loss.target_margin=0.2", "loss.non_target_margin=0", "loss.out_sample_weight=20"),
    "gce with substitution": (
        *("loss=gce", "loss.scale=24", "loss.target_margin=0.2", "loss.non_target_margin=0", "loss.out_sample_weight=5"),
        *("classifier.substitution_rate=1", *PAIRED),
    ),
    "cosface with substitution": ("loss=cosface", "loss.scale=24", "loss.margin=0.3", "classifier.substitution_rate=1", *PAIRED),
    "arcface with substitution": ("loss=arcface", "loss.scale=24", "loss.margin=0.5", "classifier.substitution_rate=1", *PAIRED),
    "combined": ("loss=combined", "loss.scale=24", "loss.angle_margin=0.2", "loss.margin=0.1"),
    "softmax": ("loss=softmax",),
    "normalized_softmax": ("loss=normalized_softmax",),
    "sphereface": ("loss=sphereface",),
    "sphereface_r": ("loss=sphereface_r", "loss.scale=24", "loss.angle_factor=1.3"),
    "magface": (
        *("loss=magface", "loss.scale=24", "loss.lower_norm=5", "loss.upper_norm=20"),
        *("loss.lower_margin=0.2", "loss.upper_margin=0.4", "loss.weight=5"),
    ),
    "adaface": ("loss=adaface", "loss.scale=24", "loss.margin=0.2"),
    "frequency_margin": ("loss=frequency_margin", "loss.scale=24", "loss.margin=0.3"),
    "sv_softmax": ("loss=sv_softmax", "loss.scale=24"),
    "mv_softmax": ("loss=mv_softmax", "loss.scale=24", "loss.margin=0.2", "loss.hardness=0.05"),
    "curricularface": ("loss=curricularface", "loss.scale=24", "loss.margin=0.3"),
    "search_softmax": ("loss=search_softmax", "loss.scale=24", "loss.modulation=-100"),
    "gb_cosface": ("loss=gb_cosface", "loss.scale=24", "loss.margin=0.1"),
    "vpl": ("loss=vpl", "loss.scale=24", "loss.margin=0.35", "loss.start=330"),
    "broadface": ("loss=broadface", "loss.scale=24", "loss.margin=0.35", "loss.queue=1000"),
    "prototype_memory": ("loss=prototype_memory", "loss.scale=24", "loss.margin=0.1"),
    "uss": ("loss=uss", "loss.scale=24", "loss.margin=0.05", *PAIRED),
    "sample_softmax": ("loss=sample_softmax", "loss.scale=24", "loss.margin=0.05", *PAIRED),
    "sample_bce": ("loss=sample_bce", "loss.scale=24", "loss.margin=0.05", *PAIRED),
    "n_plus_1_tuplet": ("loss=n_plus_1_tuplet", "loss.scale=24", *PAIRED),
    "contrastive": ("loss=contrastive", *PAIRED),
    "triplet": ("loss=triplet", "data.images_per_identity=4"),
    "unpg": ("loss=unpg", "loss.scale=24", "loss.margin=0.2", *PAIRED),
    "anchorface": ("loss=anchorface", "loss.scale=24", "loss.margin=0.2", "loss.far_weight=10", *PAIRED),
    "center": ("loss=center", "loss.scale=24", "loss.margin=0.2"),
    "range with cosface": (
        "loss=sum",
        'loss.parts=[{"name": "cosface", "scale": 24.0, "margin": 0.2}, {"name": "range"}]',
        "data.images_per_identity=4",
    ),
    "intra": ("loss=intra", "loss.scale=24", "loss.margin=0.2", *PAIRED),
}

CANDIDATES: dict[str, list[tuple[str, ...]]] = {
    "cosface": [(f"loss.margin={margin}",) for margin in (0.1, 0.2, 0.3)],
    "cosface paired": [()],
    "arcface": [(f"loss.margin={margin}",) for margin in (0.1, 0.2, 0.35, 0.5)],
    "sphereface2": [(f"loss.margin={margin}",) for margin in (0.1, 0.2, 0.3)],
    "npt": [
        (f"loss.margin={margin}", f"loss.k={k}", f"optimizer.lr={lr}")
        for margin, k, lr in ((0.35, 1, 0.1), (0.35, 10, 0.1), (0.5, 1, 0.1), (0.35, 1, 0.4))
    ],
    "uce": [(f"loss.margin={margin}",) for margin in (0.1, 0.2, 0.3)],
    "unitsface": [
        (f"loss.sample_margin={margin}", f"data.images_per_identity={images}") for margin, images in ((0.05, 2), (0.1, 2), (0.05, 4))
    ],
    "gce": [
        (f"loss.target_margin={margin}", f"loss.non_target_margin={other}", f"loss.out_sample_weight={weight}")
        for margin, other, weight in ((0.2, 0.05, 1), (0.2, 0.0, 1), (0.2, 0.0, 5), (0.2, 0.0, 20), (0.3, 0.0, 1), (0.3, 0.0, 5))
    ]
    + [(f"loss.out_sample_weight={weight}", "loss.out_sample_gradient=true") for weight in (1, 20)],
    "gce with substitution": [
        *[(f"classifier.substitution_rate={rate}", "loss.out_sample_weight=1") for rate in (0, 0.2, 0.5, 1)],
        *[(f"loss.out_sample_weight={weight}",) for weight in (5, 20)],
        ("loss.target_margin=0.3",),
        ("loss.out_sample_weight=1", "data.images_per_identity=4"),
        ("loss.out_sample_weight=1", "loss.target_margin=0.3"),
        ("loss.out_sample_gradient=true",),
        *[("classifier.substitution_source=bank", f"classifier.substitution_rate={rate}") for rate in (0.2, 1)],
        *[(f"loss.alpha={alpha}",) for alpha in (0.25, 0.75)],
        ("loss.out_samples=sum", "loss.out_sample_weight=1"),
        ("loss.queue=1024",),
    ],
    "cosface with substitution": [
        (),
        ("loss.margin=0.1",),
        ("loss.margin=0.3",),
        *[("classifier.substitution_source=bank", f"classifier.substitution_rate={rate}") for rate in (0.2, 1)],
    ],
    "anchorface": [(f"loss.far_weight={weight}",) for weight in (10, 100, 1000)],
    "mv_softmax": [(f"loss.margin={margin}", f"loss.hardness={hardness}") for margin, hardness in ((0.2, 0.2), (0.1, 0.2), (0.2, 0.05))],
}
