"""The wording of each failure, and what processes send each other about it."""

import pytest

from forge_lib.distributed.verdicts import PeerState, Reporter, Verdict
from forge_lib.errors import KINDS, PeerLostError

ALICE = PeerState(beat=9, host="alice", address="10.0.0.1", status="computing", step=7, leaving=False)
BOB = PeerState(beat=8, host="bob", address="10.0.0.2", status="saving", step=6, leaving=True)
REPORTER = Reporter(0, "alice", 7, "10.0.0.1:29500", "Start it again", {0: ALICE, 1: BOB})


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (REPORTER.crashed(KeyError("x")), "alice (process 0) failed: KeyError: 'x'"),
        (
            REPORTER.frozen(70.2),
            "alice (process 0) was frozen for 70 s: the other processes count it as lost",
        ),
        (
            REPORTER.lost_processes([1], "silent for 60 s"),
            "lost process 1 on bob (in step 7, saving): silent for 60 s. alice (process 0) was in step 8",
        ),
        (
            REPORTER.never_started([2, 3], 181),
            "lost process 2, 3: not started within 181 s; see the messages on its machine",
        ),
        (
            REPORTER.lost_main_machine("it does not answer"),
            "lost the main machine alice at 10.0.0.1:29500: it does not answer; see the messages there. "
            "alice (process 0) was in step 8",
        ),
        (
            REPORTER.unreachable(1, RuntimeError("gloo: Timed out\nmore")),
            "alice (process 0) cannot reach process 1 on bob at 10.0.0.2 (gloo: Timed out). Repair the link",
        ),
        (
            REPORTER.disconnected(RuntimeError("Connection closed by peer")),
            "step 8: the processes lost each other (Connection closed by peer)",
        ),
    ],
)
def test_each_failure_of_a_process_names_who_is_lost_and_what_to_do(verdict, text):
    assert verdict == Verdict("lost", 0, f"{text}. Start it again")
    assert isinstance(verdict.as_error(), PeerLostError) and str(verdict.as_error()) == verdict.text


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_others_know_keeps_its_kind_and_its_message(kind):
    verdict = REPORTER.own_error(kind, KINDS[kind]("the reason"))
    assert verdict == Verdict(kind, 0, "alice (process 0): the reason")
    assert type(verdict.as_error()) is KINDS[kind]


def test_the_verdict_of_a_launcher_that_starts_again_names_the_processes_of_its_machine():
    verdict = REPORTER.with_processes(Verdict("lost", -1, "lost the processes on bob", host="bob"))
    assert "lost process 1 on bob (in step 7, saving): they died, and their machine starts again" in verdict.text
    unknown = Verdict("lost", -1, "lost the processes on carol", host="carol")
    assert REPORTER.with_processes(unknown) == unknown


def test_what_is_stored_is_read_back_unchanged():
    verdict = Verdict("lost", -1, "lost the processes on bob", host="bob")
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert PeerState.from_json(BOB.to_json().encode()) == BOB


def test_the_state_of_another_version_of_this_program_is_read():
    assert PeerState.from_json('{"beat": 3, "host": "bob", "doing": "tokenizing"}') == PeerState(3, "bob")
