"""The side channel between the processes of a run."""

import json
import queue
import socket
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from commands import QUIET, SHORT, accelerate_launcher

from forge_lib.distributed import peers
from forge_lib.errors import PeerLostError, UserError
from forge_lib.process import World

pytestmark = pytest.mark.usefixtures("short_farewell")
BOB = {"beat": 1, "host": "bob", "address": "", "doing": "tokenizing", "step": 12, "leaving": False}


@pytest.fixture
def short_farewell(monkeypatch):
    """Process 1 is played by a test, and never says that it has heard."""
    monkeypatch.setattr(peers, "FAREWELL_SECONDS", 0.5)


def test_waiting_says_for_whom_and_how_far_they_are(free_port, monkeypatch, capsys):
    """Rank 1 tokenizes for longer than a waiting line takes to come, then hands in its facts."""
    monkeypatch.setattr(peers, "WAIT_LINE_SECONDS", 0.5)
    world = World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=free_port)
    with peers.Peers(world) as side:
        store = dist.TCPStore("127.0.0.1", free_port, is_master=False, timeout=timedelta(seconds=5))
        other = dist.PrefixStore("forge/0", store)
        other.set("state/1", json.dumps(BOB | {"doing": "tokenizing corpus.txt: 35%"}))
        late = threading.Timer(1.5, lambda: other.set("facts/1", "{}"))
        late.start()
        assert side.all_gather({}) == [{}, {}]
        late.join()
    assert "waits for process 1, on bob: tokenizing corpus.txt: 35%" in capsys.readouterr().err


def test_a_mistake_on_one_machine_ends_both_with_its_message(start, tmp_path, free_port):
    running = []
    for rank, path in enumerate(["data/sample_corpus.txt", "tests/test_peers.py"]):
        launcher = accelerate_launcher(tmp_path, free_port, num_machines=2, machine_rank=rank, num_processes=2)
        words = [*launcher, "scripts/train.py", *SHORT, *QUIET, "--dataset-path", path]
        running.append(start([*words, "--output-dir", tmp_path / str(rank)]))
    ended = [each.finish(60) for each in running]
    for each in ended:
        assert each.code != 0
        assert "train.py: error: " in each.output
        assert "--dataset-path tests/test_peers.py: unknown kind of file" in each.output
        assert each.seconds < 30
    assert f"{socket.gethostname()} (process 1): --dataset-path" in ended[0].output
    assert not (tmp_path / "0" / "final").exists()


def test_facts_of_all_come_back_by_rank(free_port):
    """One process plays rank 1: it writes its facts into the store as a second machine would."""
    world = World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=free_port)
    with peers.Peers(world) as side:
        other = dist.TCPStore("127.0.0.1", free_port, is_master=False, timeout=timedelta(seconds=5))
        dist.PrefixStore("forge/0", other).set("facts/1", json.dumps({"host": "bob"}))
        assert side.all_gather({"host": "alice"}) == [{"host": "alice"}, {"host": "bob"}]


def test_a_peer_that_falls_silent_is_named(free_port):
    world = World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=free_port)
    message = r"lost process 1 on bob \(in step 13, tokenizing\): silent for 1 s"
    with pytest.raises(PeerLostError, match=message), peers.Peers(world, timeout_seconds=1) as side:
        other = dist.TCPStore("127.0.0.1", free_port, is_master=False, timeout=timedelta(seconds=5))
        dist.PrefixStore("forge/0", other).set("state/1", json.dumps(BOB))
        side.all_gather({"host": "alice"})


def test_a_process_that_hangs_in_a_collective_is_ended_with_the_code_of_a_lost_peer(free_port, capsys):
    world = World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=free_port)
    codes, words = queue.Queue(), []
    with peers.Peers(world, timeout_seconds=1, leave=codes.put) as side:
        side.on_peer_error = words.append
        other = dist.TCPStore("127.0.0.1", free_port, is_master=False, timeout=timedelta(seconds=5))
        dist.PrefixStore("forge/0", other).set("state/1", json.dumps(BOB))
        assert codes.get(timeout=20) == peers.EXIT_PEER_LOST
        assert "lost process 1 on bob" in str(words[0])
        assert "lost process 1 on bob" in json.loads(dist.PrefixStore("forge/0", other).get("error"))["text"]
    assert "error: lost process 1 on bob" in capsys.readouterr().err


def test_what_another_process_says_of_the_end_is_raised_as_what_it_is(free_port):
    world = World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=free_port)
    for number, (kind, type_) in enumerate(peers.KINDS.items()):
        world = World(num_processes=2, main_address="127.0.0.1", main_port=free_port, attempt=number)
        with pytest.raises(type_, match="bob says so"), peers.Peers(world) as side:
            other = dist.TCPStore("127.0.0.1", free_port, is_master=False, timeout=timedelta(seconds=5))
            verdict = {"kind": kind, "rank": 1, "text": "bob says so"}
            dist.PrefixStore(f"forge/{number}", other).set("error", json.dumps(verdict))
            side.all_gather({})


def test_mistakes_need_no_launcher(run):
    ended = run([sys.executable, "scripts/train.py", "--batchsize", "3"])
    assert ended.code == 2
    assert (
        ended.output
        == "train.py: error: unknown flag --batchsize; did you mean --batch-size?; --help lists all flags\n"
    )


def test_a_mistake_is_what_a_process_ends_with_though_its_launcher_tells_it_to_stop(capsys):
    """SIGTERM comes while it is on its way out for a mistake of its own, or after it has heard of another's."""
    with pytest.raises(SystemExit, match="2"), peers.report_errors("x.py"):
        try:
            raise UserError("a wrong flag")
        except UserError:
            raise peers.Stopped("SIGTERM before the first step")  # noqa: B904 (as a signal does)
    assert capsys.readouterr().err == "x.py: error: a wrong flag\n"
    one = peers.Peers(World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=1))
    one._verdict = {"kind": "user", "text": "alder (process 1): a wrong flag", "rank": 1}
    found = one._settle(peers.Stopped("SIGTERM before the first step"))
    assert isinstance(found, UserError) and str(found) == "alder (process 1): a wrong flag"
