"""Who of a cluster has come, and what is wrong with the ways between the machines, before there is any launcher.

Every machine listens on the cluster's port, and asks every other one about once a second. Who is asked answers, and
both hand on all that they have heard: so each machine comes to know what the others see, also of a machine that it
cannot reach itself. What is handed on is JSON of a known form and size. Whoever reaches the port can disturb the
check, as he could disturb a run; nothing of what he says is executed or written.
"""

import errno
import ipaddress
import json
import socket
import socketserver
import statistics
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

ASK_SECONDS = 1.0
CONNECT_SECONDS = 4.0  # longer than the 3 s after which the kernel knows that nobody has an address
ANSWER_SECONDS = 4.0
FRESH_SECONDS = 8.0  # a machine that has said nothing new for so long is away
SETTLE_SECONDS = 3.0  # so long a machine that was started again may still be heard of as it was
STEADY_SECONDS = 1.0  # what is said must have been true for so long
FATAL_SECONDS = 6.0  # so long the others have to hear of what cannot mend itself
LINE_SECONDS = 10.0
CLOCK_SECONDS = 10.0  # clocks further apart than this are worth a word
LEAVE_SECONDS = 3.0  # so long a machine that ends stays, for the others to hear why
MAX_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 14
PROTOCOL = 1

Record = dict[str, Any]


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong.

    Attributes:
        machine: where to look.
        text: a sentence that names the machines.
        kind: "missing" and "way" may mend themselves, "clock" keeps nobody from going on, "fatal" ends the check.
    """

    machine: str
    text: str
    kind: str


@dataclass(frozen=True)
class Outcome:
    """How it ended.

    Attributes:
        complete: whether all machines are there and all is well, clocks aside; the same on all machines.
        problems: what is not well.
        facts: what the machines have found out about themselves, by name.
        clocks: by how many seconds each machine's clock is ahead of the main machine's, as they see each other.
    """

    complete: bool
    problems: list[Problem]
    facts: dict[str, dict]
    clocks: dict[str, float]


class Arrival:
    """One machine's part in it; use it as a context manager.

    Args:
        name: of this machine.
        addresses: of all machines, by name; the first one is the main machine's.
        port: on which each of them listens.
        cluster: a fingerprint of what all must have the same of.
        compare: is given the facts of the machines by name, and returns what must not differ and does, by machine.
    """

    def __init__(
        self,
        name: str,
        addresses: dict[str, str],
        port: int,
        cluster: str,
        compare: Callable[[dict[str, dict]], list[tuple[str, str]]] = lambda facts: [],
    ):
        self.name, self.addresses, self.port, self.compare = name, addresses, port, compare
        self.main = next(iter(addresses))
        self.others = [other for other in addresses if other != name]
        self._me: Record = {"id": uuid.uuid4().hex, "name": name, "host": socket.gethostname(), "cluster": cluster}
        self._me |= {"doing": "", "facts": {}, "goes": False, "left": False}
        self._faults: list[str] = []  # of its address and port
        self._mistakes: list[str] = []  # of the person at it
        self._ways: dict[str, str] = {}  # to each other machine, what is wrong with the way there
        self._clocks: dict[str, deque] = {other: deque(maxlen=5) for other in self.others}
        self._answered: dict[str, float] = {}  # when each has last answered
        self._records: dict[str, Record] = {}  # by id
        self._heard: dict[str, tuple[float, float]] = {}  # by id, when it was first heard of, and when it last changed
        self._lock, self._done = threading.Lock(), threading.Event()
        self._server: socketserver.TCPServer | None = None

    def __enter__(self):
        runs = [self._listen, *(lambda other=other: self._ask(other) for other in self.others)]
        self._threads = [threading.Thread(target=run, daemon=True) for run in runs]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        for thread in self._threads:
            thread.join(CONNECT_SECONDS + ANSWER_SECONDS)

    def tell(self, doing: str = "", facts: dict | None = None) -> None:
        """Tells the others what this machine does, and what it has found out about itself (of JSON types)."""
        with self._lock:
            self._me |= {"doing": doing, **({"facts": facts} if facts else {})}

    def wait(self, timeout_seconds: float, say: Callable[[str], None]) -> Outcome:
        """Waits until all machines are there, reach each other and have told their facts.

        Args:
            timeout_seconds: at the latest it ends by itself after so long.
            say: is given lines for a person, whenever something has changed.
        """
        begun = since = said_at = time.monotonic()
        said, lines, fatal_since = None, None, None
        while True:
            now = time.monotonic()
            problems = self.problems()
            if self._goes(problems):
                outcome = Outcome(True, problems, self._facts(), self._find_clocks())
                if said != (lines := self._lines(problems)):
                    for line in lines:
                        say(line)
                while not self._all_go():
                    time.sleep(0.05)
                return outcome
            found = self._lines(problems)
            if found != lines:
                lines, since = found, now
            due = now - since > STEADY_SECONDS and now - begun > STEADY_SECONDS
            if (due and lines != said) or now - said_at > LINE_SECONDS:
                said, said_at = lines, now
                for line in lines:
                    say(line)
            is_fatal = any(problem.kind == "fatal" for problem in problems)
            fatal_since = (fatal_since or now) if is_fatal else None
            left = any(records[0]["left"] for name, records in self._fresh().items() if name != self.name)
            is_over = now - begun > timeout_seconds or (fatal_since and now - fatal_since > FATAL_SECONDS)
            if left or is_over:
                for line in lines if lines != said else []:
                    say(line)
                outcome = Outcome(False, problems, self._facts(), self._find_clocks())
                self.leave()
                return outcome
            time.sleep(0.1)

    def leave(self, mistake: str = "") -> None:
        """Tells the others that this machine ends the check, and why; they end it too, and know the same.

        A mistake is told to those too that come within seconds: machines are seldom started at the same time.
        """
        with self._lock:
            self._mistakes += [mistake] if mistake else []
            self._me["left"] = True
        left = time.monotonic()
        who = self.others if mistake else [other for other in self.others if other in self._fresh()]
        while time.monotonic() - left < (FRESH_SECONDS if mistake else LEAVE_SECONDS):
            if all(self._answered.get(other, 0.0) > left for other in who):
                return
            time.sleep(0.05)

    def _facts(self) -> dict[str, dict]:
        return {name: records[0]["facts"] for name, records in self._fresh().items() if records[0]["facts"]}

    def _find_clocks(self) -> dict[str, float]:
        """The clocks, as the main machine sees them, or as they see the main machine's."""
        fresh = {name: records[0] for name, records in self._fresh().items()}
        seen_by_main = fresh.get(self.main, {}).get("clocks", {})
        clocks = {self.main: 0.0}
        for name, record in fresh.items():
            if name in seen_by_main:
                clocks[name] = seen_by_main[name]
            elif self.main in record["clocks"]:
                clocks[name] = -record["clocks"][self.main]
        return clocks

    def problems(self) -> list[Problem]:
        """Returns all that is wrong as far as this machine knows, sorted."""
        fresh = self._fresh()
        found = []
        for name, records in fresh.items():
            hosts = " and ".join(f"{record['host']} ({record['address']})" for record in records)
            if len(records) > 1:
                found.append(Problem(name, f"{len(records)} machines were started as {name}: {hosts}", "fatal"))
            for record in records:
                found += [Problem(name, f"{name}: {fault}", "fatal") for fault in record["faults"]]
                if record["cluster"] != self._me["cluster"]:
                    found.append(Problem(name, f"{name} has another cluster.yaml than {self.name}", "fatal"))
                for other, text in record["ways"].items():
                    if text and other in fresh:
                        found.append(Problem(other, f"from {name} to {other}: {text}", "way"))
        for name in self.addresses.keys() - fresh.keys():
            seen = [
                f"{other} finds {text}"
                for other, records in sorted(fresh.items())
                for record in records
                if (text := record["ways"].get(name))
            ]
            why = f": {'; '.join(seen)}" if seen else ""
            found.append(Problem(name, f"{name} ({self.addresses[name]}) is missing{why}", "missing"))
        for name, seconds in self._find_clocks().items():
            if abs(seconds) > CLOCK_SECONDS:
                way = "ahead of" if seconds > 0 else "behind"
                text = f"the clock of {name} is {abs(seconds):.0f} s {way} that of {self.main}"
                found.append(Problem(name, text, "clock"))
        try:
            found += [Problem(name, text, "fatal") for name, text in self.compare(self._facts())]
        except (KeyError, TypeError, AttributeError, ValueError):
            text = "a machine tells facts of another form: install the same version of this program on all"
            found.append(Problem("", text, "fatal"))
        return sorted(set(found))

    def _lines(self, problems: list[Problem]) -> list[str]:
        """What there is to say to a person."""
        fresh = self._fresh()
        here = [name for name in self.addresses if name in fresh]
        lines = [f"{len(here)} of {len(self.addresses)} machines are here: {', '.join(here)}"]
        busy = [f"{name} is {fresh[name][0]['doing']}" for name in here if fresh[name][0]["doing"]]
        return lines + [f"    {line}" for line in (*(problem.text for problem in problems), *busy)]

    def _goes(self, problems: list[Problem]) -> bool:
        """Whether this machine goes on: the main machine where all is well, the others when it does."""
        fresh = {name: records[0] for name, records in self._fresh().items()}
        if self.name == self.main:
            complete = all(name in fresh and fresh[name]["facts"] for name in self.addresses)
            complete &= all(len(record["ways"]) == len(self.others) for record in fresh.values())  # each was tried
            goes = complete and all(problem.kind == "clock" for problem in problems)
        else:
            goes = self.main in fresh and fresh[self.main]["goes"]
        with self._lock:
            self._me["goes"] = goes
        self._went = time.monotonic()
        return goes

    def _all_go(self) -> bool:
        """Whether the main machine knows that all others go on, and they that it knows; or time is up."""
        if time.monotonic() - self._went > FRESH_SECONDS:
            return True
        if self.name != self.main:
            return self._answered.get(self.main, 0.0) > self._went or bool(self._ways[self.main])  # or it is gone
        fresh = {name: records[0] for name, records in self._fresh().items()}
        return all(other not in fresh or fresh[other]["goes"] for other in self.others)

    def _fresh(self) -> dict[str, list[Record]]:
        """The records of the machines that are there, by name in the cluster's order; of one name usually one."""
        now = time.monotonic()
        with self._lock:
            found: dict[str, list[Record]] = {name: [] for name in self.addresses}
            found[self.name].append(self._snapshot())
            first = dict.fromkeys(self.addresses, 0.0)  # when the newest of a name was first heard of
            newest = dict.fromkeys(self.addresses, "")
            for id_, record in self._records.items():
                if self._heard[id_][0] > first[record["name"]]:
                    first[record["name"]], newest[record["name"]] = self._heard[id_][0], id_
            for id_, record in self._records.items():
                changed = self._heard[id_][1]
                # It was started again, and has another id now; what it has said last goes round for a while.
                ended = record["id"] != newest[record["name"]] and changed < first[record["name"]] + SETTLE_SECONDS
                if now - changed < FRESH_SECONDS and not ended:
                    found[record["name"]].append(record)
        return {name: sorted(records, key=lambda record: record["id"]) for name, records in found.items() if records}

    # What the threads do.

    def _snapshot(self) -> Record:
        clocks = {other: statistics.median(seconds) for other, seconds in self._clocks.items() if seconds}
        me = {
            "beat": time.monotonic_ns(),
            "faults": [*self._faults, *self._mistakes],
            "ways": dict(self._ways),
            "clocks": clocks,
        }
        return self._me | me | {"address": self.own_address()}

    def _message(self) -> bytes:
        now = time.monotonic()
        with self._lock:
            records = [r for id_, r in self._records.items() if now - self._heard[id_][1] < FRESH_SECONDS]
            content = {"check_cluster": PROTOCOL, "records": [self._snapshot(), *records], "time": time.time()}
        return json.dumps(content).encode() + b"\n"

    def _merge(self, content: Any) -> None:
        """Takes what is newer; what is not of the right form is left out."""
        now = time.monotonic()
        with self._lock:
            for record in content["records"][: 4 * len(self.addresses)]:
                if not _is_record(record) or record["name"] not in self.addresses or record["id"] == self._me["id"]:
                    continue
                before = self._records.get(record["id"])
                if before is None and len(self._records) >= 8 * len(self.addresses):
                    continue
                if before is None or record["beat"] > before["beat"]:
                    self._records[record["id"]] = record
                    self._heard[record["id"]] = (self._heard.get(record["id"], (now, now))[0], now)

    def _listen(self) -> None:
        """Answers on this machine's address; says what keeps it from that, and tries again."""
        arrival = self

        class Answer(socketserver.StreamRequestHandler):
            timeout = ANSWER_SECONDS

            def handle(self):
                try:
                    arrival._merge(_parse(self.rfile.readline(MAX_BYTES)))
                    self.wfile.write(arrival._message())
                except (OSError, ValueError, KeyError, TypeError, RecursionError):
                    pass  # a stranger, or a link that is cut

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

            def handle_error(self, *_):
                pass

        while not self._done.is_set():
            family, address, fault = self._find_own()
            Server.address_family = family
            try:
                if not fault:
                    self._server = Server((address, self.port), Answer)
            except OSError as error:
                fault = f"cannot listen on {address} port {self.port}: {error.strerror}"
                if error.errno == errno.EADDRINUSE:
                    fault = f"port {self.port} is taken by another program; end it, or change `port` in cluster.yaml"
            self._faults = [fault] if fault else []
            if not fault:
                self._server.serve_forever(poll_interval=0.1)
                return
            self._done.wait(ASK_SECONDS)

    def _find_own(self) -> tuple[int, str, str]:
        """Returns (address family, this machine's own IP address, what is wrong with it)."""
        given = self.addresses[self.name]
        own = {a.address.split("%")[0] for nic in psutil.net_if_addrs().values() for a in nic}
        try:
            infos = socket.getaddrinfo(given, self.port, type=socket.SOCK_STREAM)
        except OSError:
            return socket.AF_INET, "", f"its own name {given} does not resolve there; give its address in cluster.yaml"
        alone = len(self.addresses) == 1
        for family, *_, address in infos:
            loopback = ipaddress.ip_address(address[0].split("%")[0]).is_loopback
            if address[0] in own and (not loopback or alone or given == address[0]):
                return family, address[0], ""
            if loopback and (self.name != self.main or given == "localhost"):
                return family, self._route_address() or address[0], ""  # its own name is not used by a run
            if loopback:
                text = f"its own name {given} means {address[0]} there, as in /etc/hosts of many systems"
                return family, "", f"{text}; give its address on the network in cluster.yaml"
        found = ", ".join(sorted(a for a in own if _is_address(a))) or "none"
        return (
            socket.AF_INET,
            "",
            (f"{given} is none of its addresses ({found}); correct it in cluster.yaml, or bring the network up"),
        )

    def own_address(self) -> str:
        """Returns this machine's IP address in the cluster's network, or nothing where it has no way there."""
        return self._server.server_address[0] if self._server else self._route_address()

    def _route_address(self) -> str:
        """Returns the address by which this machine goes to the first other one that it has a way to."""
        for other in self.others:
            try:
                family, *_, address = socket.getaddrinfo(self.addresses[other], self.port, type=socket.SOCK_DGRAM)[0]
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.connect(address)  # sends nothing
                    return probe.getsockname()[0]
            except OSError:
                continue
        return ""

    def _ask(self, other: str) -> None:
        """Keeps asking another machine."""
        while not self._done.is_set():
            begun = time.monotonic()
            self._ways[other] = self._ask_once(other)
            self._done.wait(max(0.1, begun + ASK_SECONDS - time.monotonic()))

    def _ask_once(self, other: str) -> str:
        """Exchanges all that is known with another machine; returns what is wrong with the way there."""
        address, where, begun = self.addresses[other], f"port {self.port}", time.monotonic()
        try:
            link = socket.create_connection((address, self.port), timeout=CONNECT_SECONDS)
        except socket.gaierror:
            return f"that the name {address} does not resolve on {self.name}"
        except ConnectionRefusedError:
            if other in self._fresh():
                return f"its {where} refused, though the check runs there: a firewall there rejects it"
            return f"its {where} refused: the check does not run there yet, or a firewall rejects it"
        except TimeoutError:
            if other in self._fresh():
                return f"no answer at its {where}, though it is there: a firewall on the way drops what comes"
            return f"no answer at its {where}: it is off, or a firewall on the way drops what comes"
        except OSError as error:
            return self._why_unreachable(other, error, time.monotonic() - begun)
        with link:
            own, expected = link.getsockname()[0], self.own_address()
            try:
                link.settimeout(ANSWER_SECONDS)
                asked, before = time.time(), time.monotonic()
                link.sendall(self._message())
                answer = _parse(link.makefile("rb").readline(MAX_BYTES))
                took = time.monotonic() - before
                names = [record["name"] for record in answer["records"][:1] if _is_record(record)]
                self._merge(answer)
                ahead = answer["time"] - asked - took / 2
            except TimeoutError:
                return f"{where} open, but nothing comes back: packets of full size do not pass (MTU), or it hangs"
            except OSError:
                return f"{where} open, but the link breaks"
            except (ValueError, KeyError, TypeError, RecursionError):
                return f"another program at its {where}"
        self._answered[other] = before
        if took < 2:
            self._clocks[other].append(ahead)
        if names != [other]:
            return f"{', '.join(names) or 'another program'} at its address {address}: correct cluster.yaml"
        if self._server and own != expected and not ipaddress.ip_address(expected).is_loopback:
            return f"that the way there leaves {self.name} from {own}, not from {expected}: the wrong interface"
        return ""

    def _why_unreachable(self, other: str, error: OSError, seconds: float) -> str:
        """Tells apart what the kernel calls unreachable: no route, nobody at the address, a firewall's answer."""
        address = self.addresses[other]
        try:
            family, *_, target = socket.getaddrinfo(address, self.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing: it asks the route table
        except OSError:
            return f"no route to {address}: the route table of {self.name} has none"
        if error.errno != errno.EHOSTUNREACH:
            return f"no way to {address}: {error.strerror or error}"
        if seconds < 1:  # nobody is asked for an address that is known
            there = ", though it is there" if other in self._fresh() else ""
            return f"its port {self.port} rejected{there}: a firewall on the way answers that it is prohibited"
        return f"no way to {address}: nobody there has that address (it is off, or has another one)"


def _parse(line: bytes) -> dict:
    content = json.loads(line)
    if not isinstance(content, dict) or content.get("check_cluster") != PROTOCOL:
        raise ValueError("of another program")
    return content


def _is_record(record: Any) -> bool:
    """Whether something from outside has the form of a record, is small, and can be printed."""
    types = {"id": str, "name": str, "host": str, "cluster": str, "address": str, "doing": str, "beat": int}
    types |= {"goes": bool, "left": bool, "facts": dict, "faults": list, "ways": dict, "clocks": dict}
    if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in types.items()):
        return False
    if len(json.dumps(record)) > MAX_RECORD_BYTES or not _is_printable(record):
        return False
    clocks = record["clocks"].values()
    texts = [*record["faults"], *record["ways"].values()]
    return all(isinstance(text, str) for text in texts) and all(
        type(number) in (int, float) and abs(number) < 1e12 for number in clocks
    )


def _is_printable(value: Any) -> bool:
    """Whether no text in it, however deep, has control characters, as terminals obey them."""
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, dict):
        return all(isinstance(key, str) and key.isprintable() and _is_printable(each) for key, each in value.items())
    return all(map(_is_printable, value)) if isinstance(value, list) else True


def _is_address(text: str) -> bool:
    try:
        ip = ipaddress.ip_address(text)
        return not ip.is_loopback and not ip.is_link_local
    except ValueError:
        return False
