"""The forecast against steps worked out by hand."""

import pytest

from forge_lib.check import forecast
from forge_lib.check.forecast import Network, Speed

SLOW, FAST = (Speed(0.0, seconds, 0.5, 0.5, 1e9) for seconds in (2.0, 1.0))
NETWORK = Network(latency=0.0, bandwidth=100.0)


def test_a_ring_all_reduce_sends_each_byte_nearly_twice():
    """Four processes: six transfers of a quarter of the bytes each, and six latencies."""
    assert Network(0.1, 100.0).all_reduce_seconds(400, 4) == pytest.approx(6 * (0.1 + 1.0))
    assert Network(0.1, 100.0).all_reduce_seconds(400, 1) == 0


def test_latency_and_bandwidth_follow_from_the_times_of_all_reduces():
    network = Network(0.002, 5e6)
    found = forecast.fit_network(
        3, {size: network.all_reduce_seconds(size, 3) for size in (1 << 16, 1 << 20, 1 << 23)}
    )
    assert (found.latency, found.bandwidth) == (pytest.approx(0.002), pytest.approx(5e6))


def test_buckets_begin_with_the_last_parameter():
    """As in DDP, the first one ends once it has 1 MiB, the others once they have 25 MiB."""
    mib = 1 << 20
    assert forecast.buckets([10 * mib, 20 * mib, mib // 2, mib]) == [mib, 30 * mib + mib // 2]
    assert forecast.buckets([mib // 4, mib // 4]) == [mib // 2]


def test_a_step_waits_for_the_slowest_process_and_sends_during_its_backward_pass():
    """Shares of 2: gradients after 4 s and 2 s; the slow one's last backward pass takes 2 s of the 4.

    Micro-batches of 2. Two buckets of 100 bytes take 1 s each: the first is ready after 4 - 2 * 1/2 = 3 s, the second
    after 4 s. So both are sent at 5 s, a second after the gradient.
    """
    step = forecast.forecast_ddp([SLOW, FAST], [2, 2], 2, NETWORK, [100, 100])
    assert (step.seconds, step.compute, step.waiting, step.sync) == (5.5, 2.5, 2.0, 1.0)
    half = forecast.forecast_ddp([SLOW, FAST], [2, 2], 2, NETWORK, [100, 100], fp16=True)
    assert half.sync == pytest.approx(0.5)


def test_with_several_micro_batches_only_the_last_backward_pass_overlaps_with_sending():
    """Micro-batches of 1: the last backward pass takes 1 s of the 4, so the buckets are sent at 4.5 s and 5.5 s."""
    step = forecast.forecast_ddp([SLOW, FAST], [2, 2], 1, NETWORK, [100, 100])
    assert step.sync == pytest.approx(1.5)


def test_peers_train_at_their_own_speed_and_exchange_once_per_round():
    """Steps of 4.5 s and 2.5 s, so 3.214 s on average; 200 bytes take 2 s."""
    mean = 2 / (1 / 4.5 + 1 / 2.5)
    step = forecast.forecast_every([SLOW, FAST], 2, 2, NETWORK, 200, 20)
    assert (step.compute, step.waiting) == (pytest.approx(mean), 0.0)
    assert step.sync == pytest.approx(2.0 / 20)
    derived = forecast.forecast_every([SLOW, FAST], 2, 2, NETWORK, 200, 0)
    assert derived.sync == pytest.approx(2.0 / round(25 * 2.0 / mean)), "a round takes 25 times as long"


def test_shares_are_proportional_to_the_speeds_and_have_the_sum_of_the_batch():
    assert forecast.fitting_shares([FAST, SLOW], 12) == [8, 4]
    assert forecast.fitting_shares([FAST, SLOW, SLOW], 5) == [3, 1, 1]
    assert forecast.fitting_shares([Speed(0, 0.001, 0.5, 0, 1), SLOW], 8) == [7, 1], "each gets one"
