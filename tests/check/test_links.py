"""The order in which links are measured, and one link of the loopback network, measured from both ends."""

import threading

import pytest

from forge_lib.check import links


@pytest.mark.parametrize("count", range(2, 9))
def test_the_rounds_contain_each_pair_once_and_no_machine_twice_at_a_time(count):
    rounds = links.rounds(count)
    pairs = [frozenset(pair) for each in rounds for pair in each]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for each in rounds:
        busy = [machine for pair in each for machine in pair]
        assert len(busy) == len(set(busy))


def test_a_link_is_measured_from_both_ends_and_a_closed_one_is_reported(monkeypatch):
    monkeypatch.setattr(links, "WARM_SECONDS", 0.05)
    monkeypatch.setattr(links, "STREAM_SECONDS", 0.2)
    monkeypatch.setattr(links, "CONNECT_SECONDS", 0.3)
    with links.listen("127.0.0.1") as listener:
        port, rates = listener.getsockname()[1], []
        thread = threading.Thread(target=lambda: rates.append(links.receive(listener)))
        thread.start()
        assert 0 < links.send("127.0.0.1", port) < 0.1
        thread.join()
        assert rates[0] > 1e7, "loopback carries more than 10 MB/s"
        with pytest.raises(links.LinkError, match="no connection arrives"):
            links.receive(listener)
    with pytest.raises(links.LinkError, match="connection refused"):
        links.send("127.0.0.1", port)
