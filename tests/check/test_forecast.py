"""The forecast against steps worked out by hand, and its measurements against what they measure."""

import pytest
import torch

from forge_lib.check import forecast
from forge_lib.check.forecast import Network, Speed

SLOW, FAST = (Speed(0.0, seconds, 0.5, 0.5, 1e9) for seconds in (2.0, 1.0))
NETWORK = Network(latency=0.0, bandwidth=100.0)


def test_a_ring_sends_each_byte_nearly_twice():
    """Four processes: six transfers of a quarter of the bytes each, and six latencies."""
    assert Network(0.1, 100.0).all_reduce_seconds(400, 4) == pytest.approx(6 * (0.1 + 1.0))
    assert Network(0.1, 100.0).all_reduce_seconds(400, 1) == 0


def test_a_network_is_found_again_from_its_all_reduces():
    network = Network(0.002, 5e6)
    found = forecast.fit_network(
        3, {size: network.all_reduce_seconds(size, 3) for size in (1 << 16, 1 << 20, 1 << 23)}
    )
    assert (found.latency, found.bandwidth) == (pytest.approx(0.002), pytest.approx(5e6))


def test_buckets_fill_from_the_last_parameter_on():
    """The first one is closed above 1 MiB, the others above 25 MiB: as DDP does."""
    mib = 1 << 20
    assert forecast.buckets([10 * mib, 20 * mib, mib // 2, mib]) == [mib, 30 * mib + mib // 2]
    assert forecast.buckets([mib // 4, mib // 4]) == [mib // 2]


def test_a_step_waits_for_the_slowest_and_hides_what_is_sent_behind_its_backward_pass():
    """Shares of 2: gradients after 4 s and 2 s; the slow one's last backward pass takes 2 s of the 4.

    Micro-batches of 2. Two buckets of 100 bytes take 1 s each: the first is ready after 4 - 2 * 1/2 = 3 s, the second
    after 4 s. So both are sent at 5 s, a second after the gradient.
    """
    step = forecast.forecast_ddp([SLOW, FAST], [2, 2], 2, NETWORK, [100, 100])
    assert (step.seconds, step.compute, step.waiting, step.sync) == (5.5, 2.5, 2.0, 1.0)
    half = forecast.forecast_ddp([SLOW, FAST], [2, 2], 2, NETWORK, [100, 100], fp16=True)
    assert half.sync == pytest.approx(0.5)


def test_several_micro_batches_leave_the_last_one_alone_to_hide_behind():
    """Micro-batches of 1: only the last second's backward pass, of 1 s, hides: 3.5 + 1 = 4.5, and 4.5 + 1 = 5.5."""
    step = forecast.forecast_ddp([SLOW, FAST], [2, 2], 1, NETWORK, [100, 100])
    assert step.sync == pytest.approx(1.5)


def test_averaging_now_and_then_spreads_one_transfer_over_the_steps():
    step = forecast.forecast_every([SLOW, FAST], [2, 2], 2, NETWORK, 200, 20)
    assert step.seconds == pytest.approx(4.0 + 0.5 + 2.0 / 20)


def test_shares_fit_the_speeds_and_come_out_even():
    assert forecast.fitting_shares([FAST, SLOW], 12) == [8, 4]
    assert forecast.fitting_shares([FAST, SLOW, SLOW], 5) == [3, 1, 1]
    assert forecast.fitting_shares([Speed(0, 0.001, 0.5, 0, 1), SLOW], 8) == [7, 1], "each gets one"


@pytest.mark.alone
def test_a_process_is_measured_as_it_trains():
    """A model that sleeps: 10 ms, and 5 ms a sequence, in its forward pass."""
    import time

    class Sleepy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, ids, use_cache):
            time.sleep(0.01 + 0.005 * len(ids))
            return type("Output", (), {"logits": self.embedding(ids)})

    model = Sleepy()
    optimizer = torch.optim.SGD(model.parameters())
    speed = forecast.measure_speed(model, [optimizer], lambda logits, _: logits.sum(), 8, 6, "cpu", "no")
    assert speed.per_sequence == pytest.approx(0.005, rel=0.3)
    assert speed.gradient_seconds(6, 6)[0] == pytest.approx(0.04, rel=0.3)
    assert speed.backward < 0.3, "all of its time goes into the forward pass"
