"""Finds which machines of a cluster are up and which links between them fail, without a launcher."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from forge_lib.check.exchange import FRESH_SECONDS, Exchange
from forge_lib.check.machine_facts import MachineFacts, Record, find_differences

POLL_SECONDS = 0.1
STEADY_SECONDS = 1.0  # lines are printed once they have not changed for this time
LINE_SECONDS = 10.0  # and again after this time
FATAL_SECONDS = 6.0  # how long the others have to receive a problem that ends the check
LEAVE_SECONDS = 3.0  # how long a machine that ends waits until the others know
CLOCK_SECONDS = 10.0  # a larger difference between two clocks is a problem

Records = dict[str, list[Record]]


@dataclass(frozen=True, order=True)
class Problem:
    """Something that is wrong with the cluster.

    Attributes:
        machine: where to look.
        text: a sentence that names the machines.
        kind: "missing" (a machine) and "way" (a link fails) may disappear by themselves; "clock" does not stop the
            check; "fatal" ends it.
    """

    machine: str
    text: str
    kind: str


@dataclass(frozen=True)
class Outcome:
    """How the arrival of the machines ended.

    Attributes:
        complete: whether all machines are up, with no problem except clocks; the same on all machines.
        problems: sorted.
        facts: of the machines, by name.
        clocks: by how many seconds the clock of each machine is ahead of the main machine's.
    """

    complete: bool
    problems: list[Problem]
    facts: dict[str, MachineFacts]
    clocks: dict[str, float]


class Arrival:
    """Waits on one machine of a cluster until all are up, using the records that the machines exchange."""

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        self._continued_at = 0.0

    def wait(self, timeout_seconds: float, print_line: Callable[[str], None]) -> Outcome:
        """Waits until all machines are up, reach each other, and have sent their facts.

        Args:
            timeout_seconds: ends the wait at the latest after this time.
            print_line: is called with lines for the user when something has changed.
        """
        lines = _StatusLines(print_line)
        begun, fatal_since = time.monotonic(), None
        while True:
            records = self.exchange.records()
            problems = self.find_problems(records)
            text = self._describe(records, problems)
            if self._decide(records, problems):
                lines.finish(text)
                outcome = self._outcome(True, records, problems)
                while not self._is_decision_known():
                    time.sleep(POLL_SECONDS / 2)
                return outcome
            lines.update(text)
            now = time.monotonic()
            is_fatal = any(problem.kind == "fatal" for problem in problems)
            fatal_since = (fatal_since or now) if is_fatal else None
            has_peer_left = any(records[other][0].has_left for other in self.exchange.others if other in records)
            is_over = now - begun > timeout_seconds or (is_fatal and now - fatal_since > FATAL_SECONDS)
            if has_peer_left or is_over:
                lines.finish(text)
                self.leave()
                return self._outcome(False, records, problems)
            time.sleep(POLL_SECONDS)

    def leave(self, mistake: str = "") -> None:
        """Reports to the others that this machine ends the check, and why; then they end it too.

        Waits up to some seconds until they have received it. Machines are rarely started at the same time, so a
        mistake is also sent to machines that start meanwhile.
        """
        self.exchange.leave(mistake)
        left_at = time.monotonic()
        others = self.exchange.others if mistake else [o for o in self.exchange.others if o in self.exchange.records()]
        while time.monotonic() - left_at < (FRESH_SECONDS if mistake else LEAVE_SECONDS):
            if all(self.exchange.has_answered(other, since=left_at) for other in others):
                return
            time.sleep(POLL_SECONDS / 2)

    # What is wrong

    def find_problems(self, records: Records) -> list[Problem]:
        """Returns all problems that this machine knows of, sorted."""
        differences = [Problem(name, text, "fatal") for name, text in find_differences(_facts(records))]
        problems = [*self._check_records(records), *self._check_missing(records), *self._check_clocks(records)]
        return sorted({*problems, *differences})

    def _check_records(self, records: Records) -> list[Problem]:
        found = []
        own = self.exchange.name
        for name, of_name in records.items():
            if len(of_name) > 1:
                hosts = " and ".join(f"{record.host} ({record.address})" for record in of_name)
                found.append(Problem(name, f"{len(of_name)} machines were started as {name}: {hosts}", "fatal"))
            for record in of_name:
                found += [Problem(name, f"{name}: {mistake}", "fatal") for mistake in record.mistakes]
                if record.cluster != records[own][0].cluster:
                    found.append(Problem(name, f"{name} has another cluster.yaml than {own}", "fatal"))
                for other, failure in record.links.items():
                    if failure and other in records:
                        found.append(Problem(other, f"{name} cannot reach {other}: {failure}", "way"))
        return found

    def _check_missing(self, records: Records) -> list[Problem]:
        found = []
        for name in self.exchange.addresses.keys() - records.keys():
            reports = [
                f"; {other} reports: {failure}"
                for other, of_other in sorted(records.items())
                for record in of_other
                if (failure := record.links.get(name))
            ]
            text = f"{name} ({self.exchange.addresses[name]}) is missing{''.join(reports)}"
            found.append(Problem(name, text, "missing"))
        return found

    def _check_clocks(self, records: Records) -> list[Problem]:
        found = []
        for name, seconds in self._clocks(records).items():
            if abs(seconds) > CLOCK_SECONDS:
                text = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} that of {self.exchange.main}"
                found.append(Problem(name, f"the clock of {name} is {text}", "clock"))
        return found

    def _clocks(self, records: Records) -> dict[str, float]:
        """Returns the clocks as the main machine measured them or, if it did not, as measured against it."""
        main = self.exchange.main
        measured_by_main = records[main][0].clocks if main in records else {}
        clocks = {main: 0.0}
        for name, (record, *_) in records.items():
            if name in measured_by_main:
                clocks[name] = measured_by_main[name]
            elif main in record.clocks:
                clocks[name] = -record.clocks[main]
        return clocks

    def _describe(self, records: Records, problems: list[Problem]) -> list[str]:
        count = f"{len(records)} of {len(self.exchange.addresses)} machines are up: {', '.join(records)}"
        details = [problem.text for problem in problems]
        details += [f"{name} is {record.status}" for name, (record, *_) in records.items() if record.status]
        return [count, *(f"    {detail}" for detail in details)]

    def _outcome(self, complete: bool, records: Records, problems: list[Problem]) -> Outcome:
        return Outcome(complete, problems, _facts(records), self._clocks(records))

    # The common decision to continue

    def _decide(self, records: Records, problems: list[Problem]) -> bool:
        """Decides whether this machine continues: the main machine if all is well, the others once it does."""
        exchange = self.exchange
        if exchange.name == exchange.main:
            is_complete = all(name in records and records[name][0].facts for name in exchange.addresses)
            # Each machine must have tried to reach each other one.
            is_complete &= all(len(record.links) == len(exchange.others) for record, *_ in records.values())
            continues = is_complete and all(problem.kind == "clock" for problem in problems)
        else:
            continues = exchange.main in records and records[exchange.main][0].continues
        exchange.update(continues=continues)
        self._continued_at = time.monotonic()
        return continues

    def _is_decision_known(self) -> bool:
        """Returns whether the decision has reached the other machines, or some seconds have passed.

        The main machine checks that all others continue; the others check that the main machine has received that.
        """
        exchange = self.exchange
        if time.monotonic() - self._continued_at > FRESH_SECONDS:
            return True
        if exchange.name != exchange.main:  # a main machine that cannot be reached has continued
            return exchange.has_answered(exchange.main, since=self._continued_at) or exchange.is_link_broken(
                exchange.main
            )
        records = exchange.records()
        return all(other not in records or records[other][0].continues for other in exchange.others)


class _StatusLines:
    """Prints lines when they have stopped changing, and again from time to time."""

    def __init__(self, print_line: Callable[[str], None]):
        self.print_line = print_line
        self._lines: list[str] = []
        self._printed: list[str] = []
        self._changed_at = self._printed_at = time.monotonic()

    def update(self, lines: list[str]) -> None:
        now = time.monotonic()
        if lines != self._lines:
            self._lines, self._changed_at = lines, now
        is_new = lines != self._printed and now - self._changed_at > STEADY_SECONDS
        if is_new or now - self._printed_at > LINE_SECONDS:
            self._print(lines)

    def finish(self, lines: list[str]) -> None:
        """Prints the last lines, unless they were printed already."""
        if lines != self._printed:
            self._print(lines)

    def _print(self, lines: list[str]) -> None:
        self._printed, self._printed_at = lines, time.monotonic()
        for line in lines:
            self.print_line(line)


def _facts(records: Records) -> dict[str, MachineFacts]:
    return {name: record.facts for name, (record, *_) in records.items() if record.facts}
