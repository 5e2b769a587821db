"""The state that each process sends to the others, and the verdict: why a run ends, in words."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from forge_lib.errors import KINDS, first_line


@dataclass(frozen=True)
class PeerState:
    """What a process last reported about itself.

    Attributes:
        beat: number of this heartbeat; while it does not increase, the process is silent.
        host: name of its machine.
        address: its machine's address in the network of the processes; empty while unknown.
        status: what it does now.
        step: optimizer steps that it has done.
        leaving: whether it has left the `with Peers(...)` block, normally or by an error.
    """

    beat: int
    host: str
    address: str = ""
    status: str = ""
    step: int = 0
    leaving: bool = False

    def to_json(self) -> str:
        """Returns the state as it is stored."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "PeerState":
        """Reads a stored state, also that of another version of this program."""
        return cls(**_known_fields(cls, text))


@dataclass(frozen=True)
class Verdict:
    """Why a run ends. The first verdict that is stored ends all processes of the run.

    Attributes:
        kind: a key of `errors.KINDS`.
        rank: the process that reports it; -1 for a launcher.
        text: the message of the error, on all processes but the one that failed.
        host: name of the machine of a launcher that starts again, while others may still wait for its failed
            processes; else empty.
    """

    kind: str
    rank: int
    text: str
    host: str = ""

    def as_error(self) -> BaseException:
        """Returns the error that a process raises for this verdict."""
        return KINDS[self.kind](self.text)

    def to_json(self) -> str:
        """Returns the verdict as it is stored."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Verdict":
        """Reads a stored verdict, also that of another version of this program."""
        return cls(**_known_fields(cls, text))


@dataclass(frozen=True)
class Reporter:
    """The process that reports a failure. Each method returns the verdict on one kind of failure.

    Attributes:
        rank, host: this process.
        step: optimizer steps that it has done.
        main_machine: address and port of the main machine, as `address:port`.
        hint: what the user can do if a process is lost.
        states: the last known state of each process, by rank.
    """

    rank: int
    host: str
    step: int
    main_machine: str
    hint: str
    states: dict[int, PeerState]

    @property
    def name(self) -> str:
        """This process, as messages name it."""
        return f"{self.host} (process {self.rank})"

    def own_error(self, kind: str, error: BaseException) -> Verdict:
        """This process raised an error of a kind that the others know."""
        return Verdict(kind, self.rank, f"{self.name}: {error}")

    def crashed(self, error: BaseException) -> Verdict:
        """This process raised any other error."""
        return self._lost(f"{self.name} failed: {type(error).__name__}: {error}")

    def frozen(self, seconds: float) -> Verdict:
        """This process did not run for so long that the others count it as lost."""
        return self._lost(f"{self.name} was frozen for {seconds:.0f} s: the other processes count it as lost")

    def lost_processes(self, ranks: list[int], reason: str) -> Verdict:
        """Processes with a known state are lost."""
        names = [f"{self._name(rank)} (in step {state.step + 1}, {state.status})" for rank, state in self._of(ranks)]
        return self._lost(f"lost {', '.join(names)}: {reason}. {self._own_step()}")

    def never_started(self, ranks: list[int], seconds: float) -> Verdict:
        """Processes have not sent any heartbeat since this one started."""
        names = ", ".join(map(str, ranks))
        return self._lost(f"lost process {names}: not started within {seconds:.0f} s; see the messages on its machine")

    def lost_main_machine(self, reason: str) -> Verdict:
        """The store on the main machine does not answer."""
        host = f"{self.states[0].host} " if 0 in self.states else ""
        text = f"lost the main machine {host}at {self.main_machine}: {reason}; see the messages there"
        return self._lost(f"{text}. {self._own_step()}")

    def unreachable(self, rank: int, error: BaseException) -> Verdict:
        """A collective failed, all processes live, and this process cannot connect to another one."""
        text = f"{self.name} cannot reach {self._name(rank)} at {self.states[rank].address}"
        return self._lost(f"{text} ({first_line(error)}). Repair the link")

    def disconnected(self, error: BaseException) -> Verdict:
        """A collective failed, all processes live, and the cause is unknown."""
        return self._lost(f"step {self.step + 1}: the processes lost each other ({first_line(error)})")

    def with_processes(self, verdict: Verdict) -> Verdict:
        """Names the processes of the machine, if the verdict is of a launcher that starts again."""
        ranks = [rank for rank, state in self.states.items() if state.host == verdict.host]
        return self.lost_processes(ranks, "they died, and their machine starts again") if ranks else verdict

    def _of(self, ranks: list[int]) -> list[tuple[int, PeerState]]:
        return [(rank, self.states[rank]) for rank in ranks]

    def _name(self, rank: int) -> str:
        return f"process {rank} on {self.states[rank].host}"

    def _own_step(self) -> str:
        return f"{self.name} was in step {self.step + 1}"

    def _lost(self, text: str) -> Verdict:
        return Verdict("lost", self.rank, f"{text}. {self.hint}")


def _known_fields(cls: type, text: str | bytes) -> dict[str, Any]:
    """Returns the stored fields that a dataclass has."""
    values = json.loads(text)
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
