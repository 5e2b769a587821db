"""A download from a live peer."""

import os

import pytest

from forge_lib.distributed.transfer_files import PIECE_BYTES, list_files, open_partial_folder
from forge_lib.elastic.fetching import RateMeter, StoppedError, download, fetch_facts
from forge_lib.elastic.peer_facts import PeerFacts
from forge_lib.elastic.sharing import Shared, StateServer


def test_a_peer_is_asked_directly_also_if_a_proxy_is_set(monkeypatch, free_port):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with StateServer("127.0.0.1", free_port, Shared(facts={"fingerprints": {}})):
        assert fetch_facts(PeerFacts("alder", "127.0.0.1", 1, free_port)) == {"fingerprints": {}, "folders": {}}


def test_a_stop_request_ends_a_download_and_is_no_fault_of_the_other_peer(tmp_path, free_port):
    files, alder = {"a.safetensors": {"bytes": 1, "sha256": "0" * 64}}, PeerFacts("alder", "127.0.0.1", 1, free_port)
    with pytest.raises(StoppedError):
        download(alder, "state", files, tmp_path / "target", "the state", lambda: True)


def test_only_the_bytes_that_arrive_count_for_the_rate(tmp_path, free_port):
    """Two of three pieces are there from an earlier download."""
    source, target, data = tmp_path / "source", tmp_path / "target", os.urandom(3 * PIECE_BYTES)
    source.mkdir()
    (source / "weights.safetensors").write_bytes(data)
    files = list_files(source)
    partial = open_partial_folder(target, files, "it")
    (partial / "weights.safetensors").write_bytes(data[: 2 * PIECE_BYTES])
    shared, rate = Shared(folders={"state": (source, files)}), RateMeter()
    with StateServer("127.0.0.1", free_port, shared):
        alder = PeerFacts("alder", "127.0.0.1", 1, free_port)
        download(alder, "state", files, target, "the state", lambda: False, rate=rate)
    assert (target / "weights.safetensors").read_bytes() == data
    assert rate.num_bytes == PIECE_BYTES


def test_the_time_of_a_download_follows_from_the_bytes_that_have_arrived_and_their_seconds():
    rate = RateMeter()
    assert rate.seconds_for(100) == 0, "not known"
    rate.add(100, 2.0)
    rate.add(300, 6.0)
    assert rate.seconds_for(50) == 1.0
