"""What a peer notices about the others, and about its own flags."""

import logging

import pytest
from elastic_peers import peer_config

from forge_lib.elastic.others import Others
from forge_lib.elastic.peer_facts import PeerFacts
from forge_lib.elastic.round_log import warn_of_flags_without_effect
from forge_lib.errors import UserError


def test_updates_with_other_bits_than_those_of_the_others_are_an_error_in_the_end():
    others = Others(peer_config("--sync-every", "1"), lambda event, **facts: None)
    source = [PeerFacts("birch", "10.77.0.2", 1, 2, round=round) for round in range(40)]
    for round in (3, 20, 22):
        others.check_bits(round, source[round])
    others.check_bits(5, source[24])  # this peer only has an older state
    with pytest.raises(UserError, match=r"other bits than those of birch.*; use a larger --sync-every, or train\.py"):
        others.check_bits(24, source[24])


def test_a_flag_without_effect_is_reported(caplog):
    with caplog.at_level(logging.WARNING, logger="forge"):
        warn_of_flags_without_effect(peer_config())
        assert not caplog.messages
        warn_of_flags_without_effect(peer_config("--log-every", "7"))
    assert caplog.messages == ["--log-every has no effect: each round is logged"]
