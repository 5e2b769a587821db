"""How long rounds are, and when a peer is late or has the time to finish one."""

import pytest

from forge_lib.elastic.pace import fits_grace, late_after, plan_round


@pytest.mark.parametrize(
    ("remaining", "exchange", "fits"),
    [(20, 1, True), (31, 0, False), (20, 11, False), (1, 50, False), (-9, 29, True), (-9, 31, False), (-15, 1, False)],
)
def test_a_peer_that_is_asked_to_stop_finishes_its_round_only_if_half_of_the_grace_is_left_for_the_save(
    remaining, exchange, fits
):
    assert fits_grace(remaining, exchange, grace_seconds=60) is fits


def test_a_peer_is_late_after_a_tenth_of_the_round_or_after_late_seconds():
    assert late_after(100, 0) == pytest.approx(110)
    assert late_after(100, 60) == 160
    assert late_after(100, 2) == 102


def test_a_round_has_whole_steps_of_a_very_slow_peer():
    """With --sync-every 20: 60 s instead of 39 s for steps of 1 s and 60 s; 42 s instead of 37 s for 1 s and 14 s."""
    pace = plan_round([1.0, 60.0], 0.1, 20)
    assert pace.steps == [60, 1] and pace.seconds == pytest.approx(60)
    pace = plan_round([1.0, 14.0], 0.1, 20)
    assert pace.steps == [42, 3] and pace.seconds == pytest.approx(42)


@pytest.mark.parametrize("sync_every", [0, 20, 50])
@pytest.mark.parametrize("slow", [1.3, 2.0, 3.7, 9.5, 26.0, 44.0, 73.0, 150.0])
def test_of_two_peers_neither_waits_more_than_a_tenth_of_the_round_for_the_other(slow, sync_every):
    pace = plan_round([1.0, slow], 0.1, sync_every)
    assert [steps * each for steps, each in zip(pace.steps, [1.0, slow], strict=True)] == [
        pytest.approx(pace.seconds, rel=0.1)
    ] * 2


def test_the_fast_peers_do_not_train_alone_for_ever_because_of_a_hopelessly_slow_one():
    assert plan_round([0.01, 60.0], 0.1, 20).steps == [200, 1]
