"""Steps whose loss or gradient is not finite."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from forge_lib.config import TrainConfig
from forge_lib.errors import UserError
from forge_lib.training.log import MetricsLog
from forge_lib.training.nonfinite import MAX_OVERFLOWS, NonFiniteSteps


@pytest.fixture
def steps(tmp_path):
    """Makes the object under test: `steps(accelerator, on_nonfinite=...)`."""

    def make(accelerator, **flags) -> NonFiniteSteps:
        config = TrainConfig(model_name="m", dataset_path="d", output_dir="o", **flags)
        return NonFiniteSteps(config, accelerator, MetricsLog(tmp_path, enabled=False))

    return make


def test_fp16_overflows_in_every_step_end_the_run_and_a_finite_gradient_starts_the_count_again(steps):
    """With a gradient scaler an infinite gradient passes, up to the limit of steps in a row."""
    checked = steps(SimpleNamespace(scaler=torch.amp.GradScaler("cpu")))
    loss = [torch.tensor(1.0)]
    for step in range(1, MAX_OVERFLOWS + 1):
        assert checked.may_update(step, 1.0, math.inf, loss, [0])
    assert checked.may_update(step + 1, 1.0, 2.0, loss, [0])
    for step in range(1, MAX_OVERFLOWS + 1):
        assert checked.may_update(step, 1.0, math.nan, loss, [0])
    with pytest.raises(UserError, match=f"step 99: {MAX_OVERFLOWS + 1} steps in a row overflow fp16"):
        checked.may_update(99, 1.0, math.inf, loss, [0])


def test_without_a_scaler_an_infinite_gradient_is_skipped_as_often_as_allowed(steps):
    checked = steps(Accelerator(cpu=True), on_nonfinite="skip", max_skipped_steps=2)
    loss = [torch.tensor(1.0)]
    assert [checked.may_update(step, 1.0, math.inf, loss, [0]) for step in (1, 2)] == [False, False]
    with pytest.raises(UserError, match=r"step 3: not finite: not in the loss, but in the gradient \(3 such step"):
        checked.may_update(3, 1.0, math.inf, loss, [0])
