"""What the row optimizers share: which rows move, when and in what precision. Rows move chunk by chunk, in cache; with a sample rate below
1 only sampled rows and their state are read and written."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from partial_fc import collectives, place
from partial_fc.classifier import PartialFC
from partial_fc.device_policy import policy_of
from partial_fc.optimizers.rounding import round_to_bfloat16

Rows = slice | Tensor  # a range of this rank's rows, or distinct int64 row numbers


class RowOptimizer(torch.optim.Optimizer):
    """The common part of RowSGD and RowAdamW, which define how a row moves.

    unsampled    "frozen": rows outside a step's sample keep weight and state, without decay and momentum. "lazy": they move exactly as a
                 dense optimizer moves them with a gradient of 0, but only when they are sampled next (or at `flush`): through all missed
                 steps at once, each at its own learning rate. Costs another read and write of the sampled rows each step, int32 [S], and a
                 pass over all rows at least every `most_missed` steps
    in_backward  prototypes move during backward, as soon as the gradient of a chunk exists; there is never an [S, D] gradient. Set the
                 learning rate before backward; a backward pass for features alone moves prototypes too. A second backward before `step`, a
                 GradScaler and `clip` are refused; torch's clip_grad_norm_ would find no gradient and do nothing

    Prototypes in bfloat16 are moved in float32, the dtype of their state, and rounded stochastically. A step that classifier.is_finite()
    calls bad, or that a GradScaler skips, changes nothing."""

    state_names: tuple[str, ...]
    most_missed: int  # steps that "lazy" remembers

    def __init__(
        self, classifier: PartialFC, defaults: dict[str, Any], unsampled: Literal["frozen", "lazy"] = "frozen", in_backward: bool = False
    ) -> None:
        if unsampled not in ("frozen", "lazy"):
            raise ValueError(f"unsampled is {unsampled!r}, but must be 'frozen' or 'lazy'")
        if not isinstance(classifier, PartialFC):
            raise ValueError(f"{type(self).__name__} takes the PartialFC itself, not its parameters")
        super().__init__(classifier.parameters(), defaults)
        self.classifier, self.in_backward = classifier, in_backward
        for parameter in self._parameters():
            # Made at once, so that a checkpoint always has them; zeros also give torch's first step.
            matrices = {name: torch.zeros_like(parameter, dtype=_wide(parameter)) for name in self.state_names}
            self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **matrices}
        self.is_lazy = unsampled == "lazy" and classifier.config.sample_rate < 1
        self._missed: list[tuple[float, ...]] = []  # what rows outside the sample missed, step by step since the last flush
        if self.is_lazy:  # how many of these steps, from the first on, each row has made
            self._made_S = torch.zeros(len(classifier.prototypes), dtype=torch.int32, device=classifier.prototypes.device)
        self._is_moving = False  # backward has moved rows, `step` has not run yet
        self._step_supports_amp_scaling = True  # so that GradScaler also calls `step` to skip it, with its findings in `found_inf`
        classifier.companion = self
        classifier.consumer = self if in_backward else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError(f"{type(self).__name__} moves the rows of its classifier alone: give others an optimizer of their own")
        super().add_param_group(param_group)

    def _move(self, group: dict[str, Any], step: int, grad_nD: Tensor, weight_nD: Tensor, *state_nD: Tensor) -> None:
        """Makes a step of rows, in place; `step` counts from 0."""
        raise NotImplementedError

    def _missed_step(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The numbers needed to make this step later, without gradient."""
        raise NotImplementedError

    def _coefficients(self) -> np.ndarray:
        """float64 [T + 1, k]: for each s, what takes a row through steps s, ..., T - 1 of the T in `_missed`."""
        raise NotImplementedError

    def _make_up(self, coefficients_n1: list[Tensor], weight_nD: Tensor, *state_nD: Tensor) -> None:
        """Makes all steps that rows missed, in place."""
        raise NotImplementedError

    def _must_flush(self) -> bool:
        return len(self._missed) == self.most_missed

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def has_moved(self) -> bool:
        """Whether backward has moved rows, and `step` has not ended that step yet."""
        return self._is_moving

    def _steps(self, parameter: Tensor) -> int:
        return int(self.state[parameter]["step"].numpy())  # it is on the CPU: nothing waits

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves the rows, unless backward has, and ends the classifier's step. Returns what `closure` does, which is called first."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if all(parameter is not self.classifier.prototypes for parameter in self._parameters()):
            raise ValueError(
                "the prototypes became another tensor after this optimizer was made (load_state_dict(assign=True), an assignment): make "
                "the optimizer after that"
            )
        if self.classifier.is_finite() and not self._is_skipped_by_scaler():
            if self.in_backward:
                self._refuse_gradient()
            for group in self.param_groups:
                for parameter in group["params"]:
                    is_prototypes = parameter is self.classifier.prototypes
                    if parameter.grad is not None:
                        self._move_by_grad(parameter, group)
                    elif not (is_prototypes and self._is_moving):
                        continue
                    if is_prototypes and self.is_lazy and (parameter.grad is None or parameter.grad.is_sparse):
                        self._missed.append(self._missed_step(group, self._steps(parameter)))
                    self.state[parameter]["step"] += 1
        self._is_moving = False
        if self._missed and self._must_flush():
            self.flush()
        self.classifier.end_step()
        return result

    def _is_skipped_by_scaler(self) -> bool:
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return False
        if self.in_backward:
            raise ValueError("a GradScaler judges gradients after backward, in which in_backward=True has used them: use in_backward=False")
        if self.classifier.made[1] > 1 and not getattr(self, "is_judged_on_all_ranks", False):
            raise ValueError(
                "torch.amp.GradScaler looks for overflows on its own rank alone, which has its own part of the classifier, so ranks would "
                "take different steps and scales: use partial_fc.GradScaler"
            )
        for parameter in self._parameters():
            if parameter.grad is not None and scale is not None:
                (parameter.grad._values() if parameter.grad.is_sparse else parameter.grad).div_(scale)
        return bool(found_inf)

    def _move_by_grad(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad, sample = parameter.grad, self.classifier.sample
        assert grad is not None
        if not grad.is_sparse:
            if parameter is self.classifier.prototypes:
                self.flush()  # somebody's own term of the loss moves all rows
            self._move_rows(parameter, group, slice(0, len(_matrix(grad))), _matrix(grad))
        else:
            assert sample is not None
            self._move_rows(parameter, group, sample.rows_K, self.classifier.gradient_values(), sample.is_real_K)

    def _move_rows(self, parameter: Tensor, group: dict[str, Any], rows: Rows, grad_nD: Tensor, is_real_n: Tensor | None = None) -> None:
        step = self._steps(parameter)
        for part, (weight_nD, *state_nD) in self._chunks(parameter, rows, is_real_n):
            self._move(group, step, grad_nD[part].to(weight_nD.dtype), weight_nD, *state_nD)
        if self.is_lazy and isinstance(rows, Tensor):
            self._count_made(rows, is_real_n, len(self._missed) + 1)

    def _chunks(
        self, parameter: Tensor, rows: Rows, is_real_n: Tensor | None = None, stream: int = 0
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yields (slice of `rows`, [weight, *state] of them) for the loop's body to change in place, then writes them back, except padding
        (is_real_n False). `stream` separates the random numbers of several roundings within one step."""
        matrices = [_matrix(parameter.detach()), *(_matrix(self.state[parameter][name]) for name in self.state_names)]
        count = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        policy = policy_of(parameter.device)
        size = max(1, policy.moved_elements // max(1, matrices[0].shape[1]))
        # Every chunk of selected rows reuses the memory of the one before.
        buffers = [matrix.new_empty(min(size, count), matrix.shape[1]) for matrix in matrices] if isinstance(rows, Tensor) else []
        for first in range(0, count, size):
            part = slice(first, min(first + size, count))
            if isinstance(rows, Tensor):
                rows_n = rows[part]
                parts = zip(matrices, (buffer[: len(rows_n)] for buffer in buffers), strict=True)
                found = [torch.index_select(matrix, 0, rows_n, out=memory) for matrix, memory in parts]
            else:
                span = rows.start + part.start, rows.start + part.stop
                found = [matrix[slice(*span)] for matrix in matrices]
            moved = [found[0].to(_wide(parameter)), *found[1:]]
            yield part, moved
            if parameter.dtype == torch.bfloat16:
                ids_n = self.classifier.shard.first + (rows_n if isinstance(rows, Tensor) else torch.arange(*span, device=parameter.device))
                moved[0] = round_to_bfloat16(moved[0], ids_n, (self.classifier.seed, self._steps(parameter), stream))
            if not isinstance(rows, Tensor):
                found[0].copy_(moved[0])  # the same tensor, unless rounded
                continue
            is_real_n1 = None if is_real_n is None else is_real_n[part, None]
            if is_real_n1 is not None and policy.host_looks and is_real_n1.numpy().all():
                is_real_n1 = None  # most chunks have no padding
            for matrix, moved_nD in zip(matrices, moved, strict=True):
                kept_nD = moved_nD if is_real_n1 is None else torch.where(is_real_n1, moved_nD, matrix.index_select(0, rows_n))
                matrix.index_copy_(0, rows_n, kept_nD)

    def before_use(self, rows_K: Tensor) -> None:
        """The classifier calls it with the rows of each new sample. Padding, which depends on the number of ranks, stays behind."""
        if self.is_lazy:
            assert self.classifier.sample is not None
            self._catch_up(rows_K, self.classifier.sample.is_real_K)

    @torch.no_grad()
    def after_move(self) -> None:
        """The classifier calls it when its parameters have another dtype or device, which the state takes over."""
        for parameter in self._parameters():
            for name in self.state_names:
                self.state[parameter][name] = self.state[parameter][name].to(parameter.device, _wide(parameter))
        if self.is_lazy:
            self._made_S = self._made_S.to(self.classifier.prototypes.device)

    @torch.no_grad()
    def _catch_up(self, rows: Rows, is_real_n: Tensor | None = None) -> None:
        """Makes the steps that these rows missed."""
        if self._missed:
            prototypes = self.classifier.prototypes
            table = torch.from_numpy(self._coefficients()).to(prototypes.device, _wide(prototypes), non_blocking=True)
            made_n = self._made_S[rows]
            for part, (weight_nD, *state_nD) in self._chunks(prototypes, rows, is_real_n, stream=1):
                coefficients_kn = table.index_select(0, made_n[part]).T
                self._make_up(list(coefficients_kn[..., None]), weight_nD, *state_nD)
            self._count_made(rows, is_real_n, len(self._missed))

    def _count_made(self, rows: Rows, is_real_n: Tensor | None, count: int) -> None:
        self._made_S[rows] = count if is_real_n is None else torch.where(is_real_n, count, self._made_S[rows])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__}  # torch's keeps only its own attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.classifier.companion = self  # a copy of both belongs together
        self.classifier.consumer = self if self.in_backward else None

    def flush(self) -> None:
        """Makes all steps that rows missed. Call it before reading prototypes or state of classes that were not sampled, such as for an
        evaluation or your own checkpoint (`state_dict` flushes by itself). Does something only with "lazy" rows."""
        if self._is_moving:
            raise ValueError("the step is half done, as in_backward=True moved rows during backward: call step() first")
        if self._missed:
            self._catch_up(slice(0, len(self._made_S)))
            self._missed.clear()
            self._made_S.zero_()

    def begin_update(self) -> None:
        """The classifier's backward calls it once before `consume`, if in_backward."""
        if self._is_moving:
            raise ValueError(
                f"a second backward before {type(self).__name__}.step(), but in_backward=True has moved prototypes by the first gradient: "
                "call step() after every backward, or accumulate gradients with in_backward=False"
            )
        self._refuse_gradient()
        self.classifier.refuse_several_samples()
        self._is_moving = self.classifier.is_finite()

    @torch.no_grad()
    def consume(self, rows: Rows, gradient_nD: Tensor, is_real_n: Tensor | None = None) -> None:
        """Moves rows by their gradient (float32; read only). No row comes twice in one backward; padding (is_real_n False) stays."""
        if self._is_moving:
            self._move_rows(self.classifier.prototypes, self.param_groups[0], rows, gradient_nD, is_real_n)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradient of prototypes down to max_norm if its norm is larger, and returns the norm before, over the classes of all
        ranks. Call it between backward and `step`, on every rank. 1 all-reduce of a number."""
        if self.in_backward:
            raise ValueError(
                "in_backward=True has moved prototypes before the norm of their gradient is known: clip with in_backward=False"
            )
        values = self.classifier.gradient_values()
        square = torch.linalg.vector_norm(values, dtype=_wide(values)).square()
        (square,) = collectives.sum_packed([square], self.classifier.group)
        norm = square.sqrt()
        values.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))  # as torch.nn.utils.clip_grad_norm_
        return norm

    def _refuse_gradient(self) -> None:
        if self.classifier.prototypes.grad is not None:
            raise ValueError("prototypes.grad is set, but in_backward=True would never use it: call zero_grad() before backward")

    def state_dict(self) -> dict[str, Any]:
        """State of this rank's rows, all up to date."""
        self.flush()
        return {**super().state_dict(), "classes": place.saved_place(self.classifier.step, self.classifier.shard)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but state stays float32 whatever the prototypes' dtype. A torch.optim optimizer's of the same rows works too."""
        self.flush()
        state_dict = dict(state_dict)
        if (classes := state_dict.pop("classes", None)) is not None:
            place.check_saved(classes, self.classifier.shard)
        saved = [state_dict["state"].get(number, {}) for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, values in zip(self._parameters(), saved, strict=False):
            for name in self.state_names:
                shape = parameter.shape if values.get(name) is None else values[name].shape
                if shape != parameter.shape:
                    raise ValueError(
                        f"the saved {name} has shape {list(shape)}, but this rank's parameter has {list(parameter.shape)}: "
                        "load it on as many ranks as it was saved on"
                    )
        ours = dict(self.state)
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(ours)
        for parameter, values in zip(self._parameters(), saved, strict=True):
            for name, tensor in self.state[parameter].items():
                tensor.zero_() if values.get(name) is None else tensor.copy_(values[name])


def _matrix(tensor: Tensor) -> Tensor:
    """A matrix view; parameters of losses may be vectors."""
    return tensor if tensor.ndim == 2 else tensor.view(-1, 1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
