"""The figures of a training step."""

import pytest
import torch

from forge_lib.training.anomalies import SpikeDetector, Straggler, find_straggler
from forge_lib.training.gradient_sync import GradientSync
from forge_lib.training.state import step_seed


def test_the_seed_of_a_step_is_the_same_on_every_machine_and_differs_between_steps_and_processes():
    """The expected value was computed once with numpy's SeedSequence, which is documented to stay the same."""
    assert step_seed(0, 0, 0) == 7896617691693857887
    seeds = {step_seed(seed, step, rank) for seed in (-1, 0, 1) for step in range(50) for rank in range(4)}
    assert len(seeds) == 3 * 50 * 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_loss_far_above_the_median_of_the_last_ones_is_a_spike():
    detector = SpikeDetector(window=5)
    assert [detector.usual_loss(loss) for loss in (2.0, 2.1, 1.9, 2.0, 2.1)] == [None] * 5
    assert detector.usual_loss(2.2) is None
    assert detector.usual_loss(9.0) == pytest.approx(2.1)
    assert detector.usual_loss(float("nan")) is None


def test_a_process_that_takes_more_than_twice_as_long_as_the_others_is_a_straggler():
    assert find_straggler([1.0, 1.1, 3.0]) == Straggler(process=2, ratio=3.0)
    assert find_straggler([1.0, 1.9]) is None
    assert find_straggler([7.0]) is None


def test_a_single_process_sends_no_gradients():
    sync = GradientSync(torch.nn.Linear(2, 2))
    sync.backward_done()
    assert sync.pop() == (0.0, 0.0, 0.0)
