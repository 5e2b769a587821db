"""How long rounds are, and when a peer is late or has the time to finish one."""

import pytest

from forge_lib.elastic.pace import fits_grace, late_after


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
