"""The side channel between the processes of a run: a test is process 0, and writes into the store as process 1."""

import dataclasses
import json
import queue
import socket
import threading
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch.distributed as dist
from commands import QUIET, SHORT, accelerate_launcher, until

from forge_lib.distributed import heartbeat, peers
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.store import keys_of_attempt, read_verdict, store_verdict
from forge_lib.distributed.verdicts import PeerState, Verdict
from forge_lib.errors import EXIT_PEER_LOST, KINDS, PeerLostError, Stopped, UserError
from forge_lib.process import World

BOB = PeerState(beat=1, host="bob", address="", status="tokenizing", step=12, leaving=False)


@pytest.fixture(autouse=True)
def short_exit(monkeypatch):
    """Process 1 never leaves: do not wait for it."""
    monkeypatch.setattr(peers, "EXIT_SECONDS", 0.5)


@pytest.fixture
def world(free_port) -> World:
    """Two processes on this machine, seen from the first."""
    return World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=free_port)


def store_of_bob(world: World) -> dist.Store:
    """Connects to the store as process 1 does, once process 0 has opened it."""
    store = dist.TCPStore(world.main_address, world.main_port, is_master=False, timeout=timedelta(seconds=5))
    return keys_of_attempt(store, world.attempt)


@dataclass(frozen=True)
class Machine:
    """Facts that processes send each other."""

    host: str
    cores: int


def test_an_all_gather_returns_the_facts_of_all_processes_by_rank(world):
    machines = [Machine("alice", 2), Machine("bob", 4)]
    with Peers(world) as alice:
        store_of_bob(world).set("machines/1", json.dumps(dataclasses.asdict(machines[1])))
        assert alice.all_gather(machines[0], "machines") == machines
    with Peers(World()) as alone:
        assert alone.all_gather(machines[0], "machines") == machines[:1]


def test_a_process_that_sends_other_fields_is_told_to_update(world):
    with pytest.raises(UserError, match="process 1 runs another version of this program"), Peers(world) as alice:
        store_of_bob(world).set("facts/1", json.dumps({"host": "bob", "memory": 4}))
        alice.all_gather(Machine("alice", 2), "facts")


def test_the_first_text_under_a_key_stays(world):
    with Peers(world) as alice:
        store_of_bob(world).set("first/stop", "bob stops the run")
        alice.set_first("stop", "alice stops the run")
        assert alice.get_first("stop") == "bob stops the run"
    with Peers(World()) as alone:
        alone.set_first("stop", "one")
        alone.set_first("stop", "two")
        assert alone.get_first("stop") == "one"


def test_a_process_that_waits_prints_for_whom_and_how_far_they_are(world, monkeypatch, capsys):
    monkeypatch.setattr(peers, "WAIT_LINE_SECONDS", 0.5)
    with Peers(world) as alice:
        bob = store_of_bob(world)
        bob.set("state/1", dataclasses.replace(BOB, status="tokenizing corpus.txt: 35%").to_json())
        arrival = threading.Timer(1.5, lambda: bob.set("barrier/corpus/1", ""))
        arrival.start()
        assert alice.barrier("corpus") > 1
        arrival.join()
    assert "waits for process 1, on bob: tokenizing corpus.txt: 35%" in capsys.readouterr().err


def test_a_process_that_falls_silent_is_named(world):
    message = r"lost process 1 on bob \(in step 13, tokenizing\): silent for 1 s"
    with pytest.raises(PeerLostError, match=message), Peers(world, timeout_seconds=1) as alice:
        store_of_bob(world).set("state/1", BOB.to_json())
        alice.barrier("end")


def test_a_process_that_never_starts_is_named(world):
    message = "lost process 1: not started within [1-9] s"
    with pytest.raises(PeerLostError, match=message), Peers(world, timeout_seconds=1, start_seconds=1) as alice:
        alice.barrier("start")


def test_a_process_that_hangs_in_a_collective_ends_with_the_exit_code_of_a_lost_peer(world, capsys):
    exit_codes, errors = queue.Queue(), []
    with Peers(world, timeout_seconds=1, leave=exit_codes.put) as alice:
        alice.on_peer_error = errors.append
        bob = store_of_bob(world)
        bob.set("state/1", BOB.to_json())
        assert exit_codes.get(timeout=20) == EXIT_PEER_LOST
        assert "lost process 1 on bob" in str(errors[0])
        assert "lost process 1 on bob" in read_verdict(bob).text
    assert "error: lost process 1 on bob" in capsys.readouterr().err


def test_a_failed_collective_names_the_process_that_hangs(world, monkeypatch):
    """Bob sends heartbeats and has not left, so bob is the one that hangs."""
    for module in (peers, heartbeat):
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    stopped = threading.Event()

    def send_heartbeats(bob: dist.Store) -> None:
        beat = 0
        while not stopped.wait(0.1):
            beat += 1
            bob.set("state/1", dataclasses.replace(BOB, beat=beat).to_json())

    message = r"lost process 1 on bob \(in step 13, tokenizing\): it hangs \(gloo: Timed out\)"
    with pytest.raises(PeerLostError, match=message), Peers(world) as alice:
        thread = threading.Thread(target=send_heartbeats, args=(store_of_bob(world),), daemon=True)
        thread.start()
        until(lambda: 1 in alice._heartbeat.states, 10, "a heartbeat of bob")
        alice._wait_until_all_leave = lambda: (stopped.set(), thread.join())  # before the store closes
        raise RuntimeError("gloo: Timed out\nmore")


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_of_another_process_is_raised_as_the_error_that_it_was(world, kind):
    with pytest.raises(KINDS[kind], match="as bob reports"), Peers(world) as alice:
        store_verdict(store_of_bob(world), Verdict(kind, 1, "as bob reports"))
        alice.all_gather(Machine("alice", 2), "facts")


def test_sigterm_after_the_mistake_of_another_process_raises_that_mistake():
    """The launcher sends SIGTERM to the remaining processes when one of them has ended."""
    alice = Peers(World(num_processes=2))
    alice._heartbeat.verdict = Verdict("user", 1, "bob (process 1): a wrong flag")
    cause = alice._find_cause(Stopped("SIGTERM before the first step"))
    assert isinstance(cause, UserError) and str(cause) == "bob (process 1): a wrong flag"


def test_a_mistake_on_one_machine_ends_both_with_its_message(start, tmp_path, free_port):
    running = []
    for rank, path in enumerate(["data/sample_corpus.txt", "tests/conftest.py"]):
        launcher = accelerate_launcher(tmp_path, free_port, num_machines=2, machine_rank=rank, num_processes=2)
        words = [*launcher, "scripts/train.py", *SHORT, *QUIET, "--dataset-path", path]
        running.append(start([*words, "--output-dir", tmp_path / str(rank)]))
    ended = [each.finish(60) for each in running]
    for each in ended:
        assert each.code != 0
        assert "train.py: error: " in each.output
        assert "--dataset-path tests/conftest.py: unknown format; expected txt" in each.output
        assert each.seconds < 30
    assert f"{socket.gethostname()} (process 1): --dataset-path" in ended[0].output
    assert not (tmp_path / "0" / "final").exists()
