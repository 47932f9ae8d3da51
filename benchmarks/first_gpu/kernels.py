"""The classifier alone: kernels against float64, its step beside others, and whether the host ever waits for the device in it."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import classifier
from benchmarks.first_gpu.rows import NO_GPU, Row, Run, attempt, failed, unmeasured
from partial_fc import LogSumExp, PartialFC, RowSGD, SoftplusSum, TopK, losses, of_classes, similarity_statistics
from partial_fc.statistics import Statistic
from pipeline.measuring import peak_memory, seconds

Head = Callable[[Tensor, Tensor], Tensor]  # features [B, D] and labels [B] -> loss
ALLOWED = {  # (kernel, dtype of the products): largest error
    ("chunked", "float32"): "<= 1e-4",
    ("triton", "float32"): "<= 1e-4",
    ("chunked", "bfloat16"): "",
    ("triton", "bfloat16"): "<= 0.02",
}
LARGEST_EAGER = 1.2e9  # entries of the logits: the eager side holds them about eight times in float32


def parity(run: Run) -> Iterator[Row]:
    """Relative errors of the two outputs and both gradients, each as a norm over the whole tensor."""
    if not run.on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    shape = (33, 700, 32) if run.small else (257, 20_001, 512)
    for statistic in (LogSumExp(), SoftplusSum(), TopK(1)):
        exact = _answers(shape, statistic, "reference", torch.float64, run.device)
        for (kernel, dtype), target in ALLOWED.items():
            what = f"{type(statistic).__name__}, {kernel} {dtype}: largest error against float64"
            if kernel == "triton" and dtype == "bfloat16" and not run.on_gpu:
                yield unmeasured(what, f"{NO_GPU}, as products in bfloat16 are wrong in Triton's interpreter")
            else:
                yield from attempt(what, _parity, run, what, shape, statistic, kernel, dtype, exact, target)


def _parity(
    run: Run, what: str, shape: tuple[int, int, int], statistic: Statistic, kernel: str, dtype: str, exact: list[Tensor], target: str
) -> Iterator[Row]:
    found = _answers(shape, statistic, kernel, torch.float32, run.device, dtype)
    worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    yield Row(what, float(f"{worst:.2g}"), "", target, "in Triton's interpreter" if kernel == "triton" and not run.on_gpu else "")


def _answers(
    shape: tuple[int, int, int], statistic: Statistic, kernel: str, dtype: torch.dtype, device: torch.device, products: str = "float32"
) -> list[Tensor]:
    """[target, non-target, gradient of features, gradient of prototypes]"""
    batch, classes, width = shape
    generator = torch.Generator().manual_seed(0)
    features_BD, prototypes_CD = (torch.randn(rows, width, generator=generator) for rows in (batch, classes))
    labels_B = torch.randint(classes, (batch,), generator=generator).to(device)
    features_BD, prototypes_CD = (x.to(device, dtype).requires_grad_() for x in (features_BD, prototypes_CD))
    columns = of_classes(prototypes_CD, labels_B)
    found = similarity_statistics(features_BD, columns, statistic, scale=20.0, dtype=products, kernel=kernel)
    value = (found.target_B + found.non_target_B.reshape(batch)).sum()
    return [found.target_B.detach(), found.non_target_B.detach(), *torch.autograd.grad(value, [features_BD, prototypes_CD])]


def step_of_200k(run: Run) -> Iterator[Row]:
    yield from _steps(run, 200_000, {})


def step_of_1m(run: Run) -> Iterator[Row]:
    yield from _steps(run, 1_000_000, {(1024, "eager"): ">= 5", (1024, "share"): ">= 0.50", (4096, "share"): ">= 0.60"})


def step_of_10m(run: Run) -> Iterator[Row]:
    """With the optimizer's state, whose rows move during backward: the gradient of all prototypes would be another 20 GB."""
    yield from _steps(run, 10_000_000, {(1024, "step"): "runs in 80 GB"}, in_backward=True)


def _steps(run: Run, classes: int, targets: dict[tuple[int, str], str], in_backward: bool = False) -> Iterator[Row]:
    for batch in (1024,) if run.small else (1024, 4096):
        shape = (classes // 200, batch // 32, 128) if run.small else (classes, batch, 512)
        setting = classifier.Setting(
            *shape,
            dtype="bfloat16",
            pairs=3 if run.small else 7,
            step=in_backward,
            in_backward=in_backward,
            skip_eager=shape[0] * shape[1] > LARGEST_EAGER,
        )
        what = f"{setting.classes:,} classes x {setting.width}, B = {setting.batch}, bfloat16"
        wanted = {figure: text for (size, figure), text in targets.items() if size == setting.batch}  # none with `small`
        yield from attempt(what, _step, what, setting, wanted)


def _step(what: str, setting: classifier.Setting, targets: dict[str, str]) -> Iterator[Row]:
    row, target = classifier.measure(setting), targets.get
    low, high = row["ours_s_quartiles"]
    parts = "forward, backward, update" if setting.step else "forward, backward"
    yield Row(f"{what}: step", row["ours_s"], "s", target("step", ""), f"{parts}; quartiles {low:.4g} to {high:.4g}")
    yield Row(
        f"{what}: share of the matrix rate", row["matrix_share"], "", target("share", ""), f"8 B S D of {row['matrix_gflops']:,.0f} GFLOP/s"
    )
    yield Row(f"{what}: memory beyond its state", row["ours_extra_mib"], "MiB", "", f"state {row['ours_state_mib']:,.0f} MiB")
    if setting.skip_eager:
        yield unmeasured(f"{what}: eager float32 / ours", "the eager side would not fit")
    else:
        yield Row(f"{what}: eager float32 / ours", row["eager_over_ours"], "", target("eager", ""), f"eager {row['eager_s']:.4g} s")


def sync(run: Run) -> Iterator[Row]:
    """torch's own alarm for waiting: three steps after a warm-up. The one place that may wait, the check of the batch, waits for an event,
    which raises none."""
    size = (2_000, 64, 128) if run.small else (200_000, 1024, 512)
    for rate, in_backward in ((1.0, False), (1.0, True), (0.1, False)):
        what = f"places where the host waits, rate {rate:g}{', update in backward' if in_backward else ''}"
        yield from attempt(what, _waits, what, size, rate, in_backward, run.device)


def _waits(what: str, size: tuple[int, int, int], rate: float, in_backward: bool, device: torch.device) -> Iterator[Row]:
    classes, batch, width = size
    loss = losses.build("cosface", scale=64.0, margin=0.4)
    head = PartialFC(classes, width, loss, rate, dtype="bfloat16", device=device)
    optimizer = RowSGD(head, 0.1, in_backward=in_backward)
    features_BD = torch.randn(batch, width, device=device, requires_grad=True)
    labels_B = torch.randint(classes, (batch,), device=device)

    def step() -> None:
        head(features_BD, labels_B).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = Counter(f"{os.path.relpath(w.filename)}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message))
    yield Row(what, len(found), "", "0", ", ".join(f"{place} ({count} times)" for place, count in found.items()))


def rivals(run: Run) -> Iterator[Row]:
    """Plain softmax, forward and backward, beside public kernels, all in turn in this process."""
    batch, classes, rounds = (32, 500, 3) if run.small else (4096, 131_072, 7)  # the shape for which others publish figures
    for width in (64, 128) if run.small else (512, 1024):
        what = f"softmax, {classes:,} classes x {width}, B = {batch}, bfloat16"
        yield from attempt(what, _rivals, run, what, (batch, classes, width), rounds)


def _rivals(run: Run, what: str, shape: tuple[int, int, int], rounds: int) -> Iterator[Row]:
    steps, notes = {}, {}
    for name, load in RIVALS.items():
        if name in PUBLIC and not run.on_gpu:
            yield unmeasured(f"{what}: {name}", NO_GPU)
            continue
        try:
            step = Softmax(load, shape, run.device)
            loss = step()  # compiles
            extra = peak_memory(step, run.device)[0]
        except ImportError as error:
            yield unmeasured(f"{what}: {name}", str(error))
        except RuntimeError as error:
            yield failed(f"{what}: {name}", str(error))
        else:
            steps[name], notes[name] = step, f"{extra / 2**20:,.0f} MiB beyond inputs, loss {loss:.4g}"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, run.device))
    for name, values in times.items():
        middle = median(values)
        rate = 8 * math.prod(shape) / middle / 1e12
        yield Row(f"{what}: {name}", float(f"{middle:.4g}"), "s", "", f"{rate:.3g} TFLOP/s by 8 B S D, {notes[name]}")


class Softmax:
    """Forward and backward of one side; called, it returns the loss. `load(weights [C, D])` gives the function of features and labels."""

    def __init__(self, load: Callable[[nn.Parameter], Head], shape: tuple[int, int, int], device: torch.device) -> None:
        batch, classes, width = shape
        generator = torch.Generator().manual_seed(0)
        self.features_BD = torch.randn(batch, width, generator=generator).to(device, torch.bfloat16).requires_grad_()
        self.weights_CD = nn.Parameter((0.02 * torch.randn(classes, width, generator=generator)).to(device, torch.bfloat16))
        self.labels_B = torch.randint(classes, (batch,), generator=generator).to(device)
        self.head = load(self.weights_CD)

    def __call__(self) -> float:
        loss = self.head(self.features_BD, self.labels_B)
        loss.backward()
        self.features_BD.grad = self.weights_CD.grad = None
        return float(loss.detach())


def _ours(weights_CD: nn.Parameter) -> Head:
    classes, width = weights_CD.shape
    head = PartialFC(classes, width, losses.build("softmax"), dtype="bfloat16", storage_dtype="bfloat16", device=weights_CD.device)
    head.prototypes = weights_CD
    return head


def _dense(weights_CD: nn.Parameter) -> Head:
    return lambda x_BD, labels_B: functional.cross_entropy((x_BD @ weights_CD.T).float(), labels_B)


def _liger(weights_CD: nn.Parameter, rows: int | None = None) -> Head:
    """Liger's fused linear cross-entropy. By default it takes as many rows of the batch at a time as keep its memory at that of its input:
    with many classes very few, too few to keep a GPU busy. `rows` asks for more, through the option that it has for this."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def head(x_BD: Tensor, labels_B: Tensor) -> Tensor:
        options = {} if rows is None else {"chunk_mem_const": -(-weights_CD.shape[0] * rows // x_BD.numel())}
        return liger_fused_linear_cross_entropy(x_BD, weights_CD, labels_B, accum_dtype=torch.float32, **options)

    return head


def _cut(weights_CD: nn.Parameter) -> Head:
    """Apple's cut cross-entropy, without its filter: by default it leaves out gradients of small probabilities, and random weights have no
    others."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda x_BD, labels_B: linear_cross_entropy(x_BD, weights_CD, labels_B, filter_eps=None)


PUBLIC: dict[str, Callable[[nn.Parameter], Head]] = {
    "Liger": _liger,
    "Liger, 1024 rows at a time": partial(_liger, rows=1024),
    "cut cross-entropy": _cut,
}
RIVALS = {"ours": _ours, "dense": _dense} | PUBLIC
