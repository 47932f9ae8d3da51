"""The learning rate over a run."""

from __future__ import annotations

import pytest

from pipeline.schedule import OptimizerConfig, rate_factor


@pytest.mark.parametrize("schedule", ["polynomial", "cosine"])
def test_warm_up_starts_at_its_first_rate_and_the_end_is_near_zero(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_epochs=1)
    rates = [rate_factor(config, step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0 and 0 < rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_polynomial_values():
    config = OptimizerConfig(power=2.0)
    assert [rate_factor(config, step, 10, 0) for step in (0, 5, 9)] == pytest.approx([1.0, 0.25, 0.01])


def test_steps_fall_at_the_beginning_of_their_epochs():
    config = OptimizerConfig(schedule="steps", step_epochs=(2, 2.5), step_factor=0.1, warmup_epochs=0.5)
    rates = [rate_factor(config, step, 30, 10.0) for step in range(30)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([1.0] * 15 + [0.1] * 5 + [0.01] * 5)
    for wrong in ({"schedule": "steps"}, {"step_epochs": (1,)}, {"schedule": "steps", "step_epochs": (1,), "step_factor": 0.0}):
        with pytest.raises(ValueError, match=r"optimizer\.step_"):
            OptimizerConfig(**wrong)
