"""This peer among the others: asks for a quorum, catches up, exchanges, and learns what it computes next.

Only the main process of a peer has a Peer.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from safetensors import SafetensorError

from forge_lib.checkpoints.format import describe_error
from forge_lib.distributed.network import interface_of
from forge_lib.elastic.catch_up import catch_up
from forge_lib.elastic.connecting import own_address, running_lighthouse, should_serve
from forge_lib.elastic.meeting import Exchanged, Meeting, connected_members, ready_members
from forge_lib.elastic.membership import Membership
from forge_lib.elastic.others import Others
from forge_lib.elastic.pace import late_after
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.elastic.peer_group import PeerGroup
from forge_lib.elastic.planning import plan_work, remembered, slowest_update
from forge_lib.elastic.sharing import Shared, StateServer
from forge_lib.elastic.state_files import StateFiles
from forge_lib.elastic.work import Met, Summed, Work
from forge_lib.peers_config import ElasticConfig

logger = logging.getLogger("forge")

RESTART_SECONDS = 30.0  # how long a peer that starts again waits for those of the last round
STATUS_SECONDS = 30.0  # between two lines about missing peers
PAUSE_LIMIT_SECONDS = 300.0  # between two rounds, for what is not computing: after that, this peer is late
PAUSE_SECONDS = 30.0  # after a download that has failed with --sync-every 1
LINGER_SECONDS = 20.0  # how long a complete peer waits for one that was there and is late, and for the lighthouse
DOWNLOAD_SECONDS = 40.0  # without a piece; after that a download has ended, or cannot go on
LEAST_LATE_SECONDS = 1.5  # after the planned end of a short round: heartbeats do not tell a tenth of it
RETRY_SECONDS = 0.5  # between two quorums while too few peers are there


class Peer:
    """The connections of this peer to the others. Use it as a context manager.

    Args:
        config: every flag.
        report: called with (event, facts) for the log: peer_joined, peer_lost, healed, exchange_failed and others.
        is_asked_to_stop: returns whether this peer is asked to stop.

    Attributes:
        state, files: shared with the others, and its files; state is None before `own_state`.
        shared: what it serves to others.
        address: of this peer.
        step_seconds: of a step, measured; 0: not known. The loop sets it.
        exchange_seconds: of the last exchange with others; 0: there was none.
    """

    files: StateFiles
    _meeting: Meeting

    def __init__(self, config: ElasticConfig, report: Callable[..., None], is_asked_to_stop: Callable[[], bool]):
        self.config, self._report, self._gives_up = config, report, is_asked_to_stop
        self.shared, self.state = Shared(), None
        self.step_seconds = self.exchange_seconds = self._update_seconds = 0.0
        self._started_at = 0.0  # when this peer first met others
        self._has_trained = self._has_exchanged = False  # since its start
        self._behind: dict[str, int] = {}  # round by identifier, of the peers that had an older state
        self._behind_at = 0.0  # when this peer, while it trained, last met one of them
        self._noted_at = -STATUS_SECONDS  # when the last line about missing peers was logged
        self._others = Others(config, report)
        self._contexts = ExitStack()

    def __enter__(self) -> "Peer":
        config = self.config
        urls = config.lighthouses
        with ExitStack() as contexts:
            if config.serve_lighthouse and (own_port := should_serve(urls)):
                contexts.enter_context(running_lighthouse(own_port))
            self.address = own_address(config.peer_address, urls)
            if interface := interface_of(self.address):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            # First, because it binds the address: the group's store would try for minutes to connect to a wrong one.
            contexts.enter_context(StateServer(self.address, config.peer_port + 1, self.shared))
            self._group = PeerGroup(self.address, config.peer_port)
            contexts.callback(self._group.close)
            self.membership = contexts.enter_context(Membership(urls, config.name))
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    def own_state(self, files: StateFiles, fixed: dict) -> None:
        """Gives this peer its state, and the values that must be equal on all peers."""
        self.files, self.state = files, files.state
        self._others.fixed = fixed
        self._meeting = Meeting(self.config, self.state, self._group, self.membership.id)

    def facts(self, work: Work, **more: Any) -> PeerFacts:
        """Returns what this peer tells the others; without a state if it has none yet."""
        ports = (self.config.peer_port, self.config.peer_port + 1)
        facts = PeerFacts(self.config.name, self.address, *ports)
        if self.state is None:
            return facts
        return dataclasses.replace(
            facts,
            round=self.state.round,
            state_hash=self.state.hash,
            index=work.index,
            group_size=work.group_size,
            plan=work.plan,
            steps=work.steps,
            tokens=work.targets,
            loss=work.loss,
            step_seconds=self.step_seconds,
            exchange_seconds=self.exchange_seconds,
            update_seconds=self._update_seconds,
            compute_seconds=work.compute_seconds,
            busy_seconds=work.busy_seconds,
            committed=self.state.ledger.num_committed,
            failures=self._others.failures,
            unreachable=self._others.unreachable,
            has_exchanged=self._has_exchanged,
            is_leaving=self._gives_up(),
            is_complete=self.state.ledger.is_complete,
            wanted=self._num_wanted(),
            config=self._others.fixed,
            **more,
        )

    def meet(self, work: Work, gives_up: Callable[[], bool]) -> Met:
        """Meets the other peers at the end of a round, or to join them: returns when the next round begins.

        Args:
            work: of this peer in the current round.
            gives_up: called now and then; once it returns true, this peer drops its work and waits no longer.

        Raises:
            UserError: this peer's flags or data differ from those of the peers that train.
        """
        exchanges, lost, changed = [], 0, False
        self._started_at = self._started_at or time.monotonic()
        if work.targets and self.config.sync_every != 1 and not self._meeting.is_finite():
            logger.warning("this peer's weights are not finite: what it has computed in this round is dropped")
            self._report("not_finite", where=f"the weights of {self.config.name}")
            lost, work = self.drop(work), Work()
        while True:
            members = self.membership.quorum(self.facts(work), gives_up)
            if members is None:
                self.leave()
                return Met(None, exchanges, lost + self.drop(work), changed)
            self._others.note(members, self.membership.id)
            members = self._connected(members)
            if not members:
                lost, work, changed = lost + self.drop(work), Work(), True
                continue
            ready = ready_members(members)
            is_ready = self.membership.id in [member.id for member in ready]
            computed = any(member.facts.tokens for member in ready)
            is_busy = any(member.facts.sums for member in ready) or (computed and self.config.sync_every == 1)
            if is_busy and (is_ready or self.config.sync_every == 1):
                time.sleep(RETRY_SECONDS)  # they are in the middle of something, and meet this peer right after it
                continue
            if not is_ready:
                self._others.check_config(ready[0].facts)
                dropped = self._catch_up(work, ready)
                if dropped is not None:
                    lost, work, changed = lost + dropped, Work(), True
                continue
            if computed:
                exchanged = self._exchange(ready)
                if not exchanged:
                    continue
                exchanges.append((exchanged, ready))
                changed = True
                if work.targets and self.membership.id not in exchanged.commit.contributors:
                    lost += work.targets  # another plan of this round has more work
            self._serve(members, ready)
            if not computed and self._is_waiting_for_more(ready):
                time.sleep(RETRY_SECONDS)
                continue
            if self.config.sync_every == 1 and len(ready) < len(members):
                time.sleep(RETRY_SECONDS)  # all wait until the others have the state, too
                continue
            return Met(self.plan(members, ready), exchanges, lost, changed)

    def _connected(self, members: list[Member]) -> list[Member]:
        """Returns the members that can exchange; none if this one is left out, after a pause."""
        connected, own = connected_members(members), self.membership.id
        if own not in [member.id for member in connected]:
            self._pause(self._others.left_out(self.state.round, members, own))
            return []
        if len(connected) < len(members):  # is it still so?
            self._others.probe([member for member in members if member not in connected], own)
        return connected

    def _serve(self, members: list[Member], ready: list[Member]) -> None:
        """Writes the state for the members that lack it, unless the updates that are served are enough for them.

        One peer does that. Should it not help (its disk may be full), all of them do.
        """
        behind = {member.id: member.facts.round for member in members if member not in ready}
        is_stuck = any(self._behind.get(name) == round for name, round in behind.items())
        self._note_behind(members, behind)
        self._behind_at = time.monotonic() if behind else self._behind_at
        is_first = ready[0].id == self.membership.id
        if is_stuck or (is_first and any(map(self.files.needs_snapshot, behind.values()))):
            self._keep(self.files.serve_snapshot)

    def _note_behind(self, members: list[Member], behind: dict[str, int]) -> None:
        """Remembers which peers have an older state; one that is gone is forgotten when it is back with the newest."""
        self._behind |= behind
        for member in members:
            if member.id not in behind:
                self._behind.pop(member.id, None)

    def _is_waiting_for_more(self, ready: list[Member]) -> bool:
        """Returns whether nobody trains yet, and all that are there wait for more."""
        wanted = min(member.facts.wanted for member in ready)
        if any(member.facts.index >= 0 for member in ready) or len(ready) >= wanted:
            return False
        if time.monotonic() - self._noted_at > STATUS_SECONDS:
            self._noted_at = time.monotonic()
            logger.info(f"{len(ready)} of {wanted} peers are there; waiting for the others")
        self.membership.on_wait(f"{wanted - len(ready)} more of {wanted} peers")
        return True

    def _num_wanted(self) -> int:
        """Returns how many peers should be there before a round begins that nobody has begun yet.

        After a restart these are the peers of the last round, for a while: one of them may have a newer state. Once
        this peer has trained, it waits for nobody: the others may be gone.
        """
        if self._has_trained:
            return 1
        is_patient = time.monotonic() - self._started_at < RESTART_SECONDS
        return max(self.config.min_peers, self.state.num_contributors if is_patient else 1)

    def sum_gradients(self, work: Work, gives_up: Callable[[], bool]) -> Summed | None:
        """Adds up the gradients of all peers of a step, and commits its samples: `--sync-every 1`.

        Args:
            work: of this peer in the step.
            gives_up: called now and then; once it returns true, this peer waits no longer.

        Returns:
            None if a peer of the step is lost, or this one is asked to stop: the step is not committed.
        """
        members = self.membership.quorum(self.facts(work), gives_up)
        group = [member for member in ready_members(members or []) if member.facts.plan == work.plan]
        if self.membership.id not in [member.id for member in group] or len(group) < work.group_size:
            self._meeting.close()  # one of them may have closed its side
            return None
        self._others.note(members, self.membership.id)
        try:
            exchanged, total = self._meeting.sum_gradients(group, work.batch)
        except RuntimeError as error:
            self._note_failure(error, group)
            return None
        self._exchanged(exchanged, group)
        self.state.commit(exchanged.commit)
        return Summed(exchanged, total, group, is_alone=len(group) == len(members))

    def plan(self, members: list[Member], ready: list[Member]) -> Work:
        """Returns this peer's work in the round that begins; the same call on the others gives them theirs.

        Args:
            members: of the quorum.
            ready: those of them that take part.
        """
        self._has_trained = True
        update_seconds = slowest_update(members)
        is_serving = time.monotonic() - self.shared.served_at < DOWNLOAD_SECONDS
        self._update_seconds = remembered(update_seconds, is_serving)
        own, state = self.membership.id, self.state
        return plan_work(self.config, state.ledger, state.round, ready, own, update_seconds)

    def linger(self) -> None:
        """Serves a complete run until all living peers have it; waits for a late one as long as it comes nearer."""
        seen, begun, is_noted = set(), time.monotonic(), False
        until = self._behind_at + DOWNLOAD_SECONDS  # one that was behind may pause after a failed download

        def gives_up() -> bool:
            lost_at = self.membership.lost_at
            is_lost = lost_at and time.monotonic() - max(lost_at, begun) > LINGER_SECONDS
            return self._gives_up() or bool(is_lost)

        while members := self.membership.quorum(self.facts(Work()), gives_up):
            late = {member.id: member.facts.round for member in members if not member.facts.is_complete}
            self._note_behind(members, late)
            if late.items() - seen:
                until, seen = time.monotonic() + LINGER_SECONDS, seen | late.items()
                self._keep(self.files.serve_snapshot)
            if not self._behind or time.monotonic() > max(until, self.shared.served_at + DOWNLOAD_SECONDS):
                break
            if not is_noted:
                logger.info("the run is complete; serving it until the peers that are behind have it")
                is_noted = True
            time.sleep(RETRY_SECONDS)
        self.leave()

    def drop(self, work: Work) -> int:
        """Drops what this peer has computed in the round; returns the predicted tokens that are lost."""
        if work.steps:
            self._meeting.drop()
        return work.targets

    def expect(self, work: Work) -> None:
        """Promises the others to ask for the next quorum in time; a peer that is later than that is not waited for.

        Call it when the first step of a round begins.
        """
        if not work.planned_seconds:
            self.membership.expect()
            return
        seconds = late_after(work.planned_seconds, self.config.late_seconds)
        if not self.config.late_seconds:  # a step that has begun is always computed
            seconds = max(seconds, work.planned_seconds + max(self.step_seconds, LEAST_LATE_SECONDS))
        self.membership.expect(seconds)

    def expect_soon(self, seconds: float = PAUSE_LIMIT_SECONDS) -> None:
        """Promises the same between two rounds, while files are written: a hanging disk does not stop the others."""
        self.membership.expect(seconds)

    def leave(self) -> None:
        """Tells the others not to wait for this peer any longer."""
        self.membership.leave()

    def _exchange(self, ready: list[Member]) -> Exchanged | None:
        before = self.state.hash
        try:
            exchanged, data = self._meeting.exchange(ready)
        except RuntimeError as error:
            self._note_failure(error, ready)
            return None
        self._exchanged(exchanged, ready)
        self._keep(lambda: self.files.keep_update(exchanged.commit, data, before))
        return exchanged

    def _exchanged(self, exchanged: Exchanged, members: list[Member]) -> None:
        if len(members) > 1:  # one peer alone sends nothing
            self.exchange_seconds, self._has_exchanged = exchanged.seconds, True
            self._others.exchanged()
        self._others.failures = 0

    def _keep(self, write: Callable[[], None]) -> None:
        """Writes files for others; a disk that is full or hangs is no reason to stop training."""
        self.expect_soon()
        try:
            write()
        except (OSError, SafetensorError) as error:
            logger.warning(f"the files for other peers cannot be written: {describe_error(error)}; the run continues")
            self._report("not_shared", error=describe_error(error))

    def _note_failure(self, error: RuntimeError, members: list[Member]) -> None:
        self._others.exchange_failed(self.state.round + 1, error, members, self.membership.id)
        self._meeting.close()

    def _catch_up(self, work: Work, ready: list[Member]) -> int | None:
        """Gets the state of the others.

        Returns:
            The predicted tokens of this peer that are lost; None if nothing was fetched: then its work can still be
            in the others' state.
        """
        source, before = ready[0].facts, self.state.round
        if self.config.sync_every != 1:
            self.leave()  # they do not wait meanwhile
        logger.info(f"catching up from round {before} to round {source.round} with {source.name}")
        if before and source.round <= before and self.config.sync_every != 1:  # rounds of another history
            logger.warning(
                f"what this peer has trained without {source.name} does not count: {source.name} has trained more"
            )
        had_work = bool(work.steps)
        own_hash = self.state.hash
        found = catch_up(self.files, self._meeting, ready, self._gives_up)
        self._update_seconds = max(found.update_seconds, self._update_seconds)
        if self.state.hash == own_hash and not found.was_dropped:  # nothing was fetched
            if self.config.sync_every == 1:
                self._pause(PAUSE_SECONDS)  # the others wait for each peer that lacks the state
            return None
        self._others.failures = 0
        lost = 0 if found.contributed or not had_work else work.targets
        if lost:
            self._report("late", round=before + 1, tokens_lost=lost)
        self._others.check_bits(before, source)
        if self.state.hash == source.state_hash or self.state.round > before:
            self._report("healed", round=self.state.round, from_round=before, source=source.name, tokens_lost=lost)
        return lost

    def _pause(self, seconds: float) -> None:
        """Lets the others train for a while."""
        self.leave()
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._gives_up():
            time.sleep(RETRY_SECONDS)
