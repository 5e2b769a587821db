"""The roll call of the machines, before any launcher is started, over the main machine's port.

Who is missing, whose number is taken, which port is in use and which machine cannot be reached are said at once;
accelerate's launcher would wait for ten minutes in silence.
"""

import errno
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

from forge_lib.config import LaunchConfig
from forge_lib.errors import UserError

T = TypeVar("T")
REACH_SECONDS = 20  # how long a machine tries to reach the main machine, and waits for its answer
POLL_SECONDS = 0.25
FAREWELL_SECONDS = 3


class AwayError(UserError):
    """A machine that does not come or cannot be reached: at first a mistake, in a restart to be waited for."""


class Roll:
    """One machine's part in the roll call: it waits until every machine is there.

    A machine that is away is a mistake at first. In a restart it is waited for, by the name that it had.
    """

    def __init__(
        self,
        config: LaunchConfig,
        machine_id: str,
        hosts: dict[int, str],
        is_patient: bool,
        until: float,
        tell: Connection,
    ):
        self.config, self.hosts, self.is_patient, self.until, self.tell = config, hosts, is_patient, until, tell
        self.me = {"id": machine_id, "host": socket.gethostname(), "num_nodes": config.num_nodes}
        at = f"{hosts[0]} at " if 0 in hosts else ""
        self.main_machine = f"the main machine {at}{config.master_addr}:{config.master_port}"

    def call(self) -> dict[int, str]:
        """Returns the host names by machine number, and leaves the main machine's port to accelerate's launcher.

        Raises:
            AwayError: the main machine cannot be reached, or a machine is missing after `join_timeout`.
            UserError: a number is taken twice, or another machine has made a mistake.
        """
        try:
            return self._call()
        except (dist.DistError, OSError) as error:
            who = self.main_machine if self.config.node_rank else "another machine"
            raise AwayError(f"lost {who}: {str(error).splitlines()[0]}; see its message there") from None

    def _call(self) -> dict[int, str]:
        config = self.config
        link = self._reach() if config.node_rank else None
        try:
            store = _open_store(config, timeout_seconds=REACH_SECONDS / 2, is_master=config.node_rank == 0)
        except AwayError as error:
            raise (error if config.node_rank else _tell_main_machine(config, error)) from None
        if self.is_patient:
            # Processes of the attempt before may be on this port still, waiting for one that is gone.
            text = f"lost the processes on {self.me['host']}, which starts anew"
            verdict = {"kind": "lost", "rank": -1, "host": self.me["host"], "text": text}
            _ask(dist.PrefixStore("forge/0", store.underlying_store).compare_set, "error", "", json.dumps(verdict))
        self._sign_in(store)
        start = time.monotonic()
        while missing := [n for n in range(config.num_nodes) if not _ask(store.check, [f"node/{n}"])]:
            self._hear(store)
            names = [f"{n} ({self.hosts[n]})" if n in self.hosts else str(n) for n in missing]
            who = f"machine{'s' if len(missing) > 1 else ''} {', '.join(names)} of {config.num_nodes}"
            if time.monotonic() > (self.until if self.is_patient else start + config.join_timeout):
                raise AwayError(f"{who} did not come within --join-timeout {config.join_timeout:g} s; start them too")
            self._wait_for(f"{who} (--node-rank) at {config.master_addr}:{config.master_port}")
            time.sleep(POLL_SECONDS)
        self._hear(store)
        hosts = {n: json.loads(_ask(store.get, f"node/{n}"))["host"] for n in range(config.num_nodes)}
        _ask(store.set, f"ready/{config.node_rank}", "")
        if link:
            link.settimeout(REACH_SECONDS)
            link.recv(1)  # ends when the main machine has closed its store
            link.close()
        else:
            store.wait([f"ready/{n}" for n in range(config.num_nodes)], timedelta(seconds=REACH_SECONDS))
        return hosts

    def _sign_in(self, store: dist.Store) -> None:
        """Takes this machine's number; the mistake is told to all where that cannot be."""
        config, me = self.config, self.me
        holder = json.loads(_ask(store.compare_set, f"node/{config.node_rank}", "", json.dumps(me)))
        until = self.until if self.is_patient else time.monotonic() + REACH_SECONDS
        while not _ask(store.check, ["node/0"]):
            if time.monotonic() > until:
                raise AwayError(f"{self.main_machine} is there, but calls no roll")
            self._wait_for(f"{self.main_machine}: its attempt before has not ended")
            time.sleep(POLL_SECONDS)
        main_machine = json.loads(_ask(store.get, "node/0"))
        if holder["id"] != me["id"]:
            mistake = f"two machines were started as --node-rank {config.node_rank}: {holder['host']} and {me['host']}"
        elif main_machine["num_nodes"] != config.num_nodes:
            mistake = (
                f"{me['host']} was started with --num-nodes {config.num_nodes}, the main machine "
                f"{main_machine['host']} with {main_machine['num_nodes']}"
            )
        else:
            return
        _tell(store, mistake)
        raise UserError(mistake)

    def _reach(self) -> socket.socket:
        """Returns a connection to the main machine, telling apart the ways in which that can fail."""
        config = self.config
        patience = config.join_timeout if self.is_patient else REACH_SECONDS
        until = self.until if self.is_patient else time.monotonic() + REACH_SECONDS
        while True:
            try:
                return socket.create_connection((config.master_addr, config.master_port), timeout=5)
            except socket.gaierror:
                if not self.is_patient:
                    raise UserError(
                        f"--master-addr {config.master_addr}: the name does not resolve on this machine"
                    ) from None
                reason, cure = "no address", "the name does not resolve on this machine"
            except ConnectionRefusedError:
                reason = "refused"
                cure = "it is there, but nothing listens on that port: start the main machine (--node-rank 0) first"
            except TimeoutError:
                reason, cure = "no answer", "it is off, or a firewall drops what is sent to that port"
            except OSError as error:
                reason, cure = (error.strerror or str(error)).lower(), "check --master-addr and the network"
            if time.monotonic() > until:
                raise AwayError(f"cannot reach {self.main_machine} for {patience:g} s: {reason}: {cure}")
            if self.is_patient:
                self._wait_for(f"{self.main_machine}: {reason}")
            time.sleep(1)

    def _wait_for(self, whom: str) -> None:
        self.tell.send(("waits", f"{self.me['host']} waits for {whom}"))

    def _hear(self, store: dist.Store) -> None:
        """Raises the mistake that another machine has left."""
        try:
            if not _ask(store.check, ["error"]):
                return
            mistake = _ask(store.get, "error").decode()
        except dist.DistError:
            raise AwayError(f"{self.main_machine} has stopped; see its message there") from None
        if self.config.node_rank == 0:
            time.sleep(FAREWELL_SECONDS)  # the store ends with this process: let the others read it first
        raise UserError(mistake)


def check_port(config: LaunchConfig, patience_seconds: float) -> None:
    """The main machine must own the main address, and the port must be free there, at the latest after a while."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.master_addr, config.master_port, type=socket.SOCK_STREAM)[
            0
        ]
    except socket.gaierror:
        raise AwayError(f"--master-addr {config.master_addr}: the name does not resolve") from None
    until = time.monotonic() + patience_seconds
    while error := _try_port(family, address):
        if error.errno != errno.EADDRINUSE or time.monotonic() >= until:
            break
        time.sleep(POLL_SECONDS)
    else:
        return
    mistake = UserError(f"--master-port {config.master_port}: {error.strerror} on {socket.gethostname()}")
    if error.errno == errno.EADDRINUSE:
        mistake = UserError(
            f"--master-port {config.master_port} is in use on {socket.gethostname()}, by another run or another "
            "program; give another port, the same on every machine"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        own = sorted(a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == family)
        mistake = AwayError(
            f"this machine ({socket.gethostname()}: {', '.join(own)}) was started as --node-rank 0, but "
            f"--master-addr {config.master_addr} is not its address; number 0 is the main machine's, each other "
            "machine needs a number of its own"
        )
    if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) and config.num_nodes > 1:
        mistake = _tell_main_machine(config, mistake)
    raise mistake


def _try_port(family: int, address: tuple) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _tell_main_machine(config: LaunchConfig, mistake: UserError) -> UserError:
    """Returns the mistake; a main machine that calls the roll already is told of it, as one of two with its number."""
    try:
        store = _open_store(config, timeout_seconds=3)
        _patiently(lambda: store.wait(["node/0"], timedelta(seconds=3)), 6)
    except (UserError, dist.DistError, OSError):
        return mistake  # whatever is at that address, it calls no roll
    mistake = UserError(f"two machines were started as --node-rank 0: {mistake}")
    _tell(store, str(mistake))
    return mistake


def _open_store(config: LaunchConfig, timeout_seconds: float, is_master: bool = False) -> dist.Store:
    """Opens the store on the main machine's port; AwayError where that cannot be."""

    def connect() -> dist.Store:
        return dist.TCPStore(
            config.master_addr,
            config.master_port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )

    try:
        return dist.PrefixStore("forge-roll", _patiently(connect, timeout_seconds))
    except (dist.DistError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
    where = f"{config.master_addr}:{config.master_port}"
    if is_master:
        raise AwayError(f"cannot listen on {where}: {reason}; give another --master-port")
    raise AwayError(f"{where} answers, but not as a main machine does: is it another program's port? ({reason})")


def _ask(operation: Callable[..., T], *args: Any) -> T:
    return _patiently(lambda: operation(*args), REACH_SECONDS)


def _patiently(operation: Callable[[], T], timeout_seconds: float) -> T:
    """Returns what a store's operation returns; TimeoutError where it does not.

    It runs in a thread that can be left behind, since torch waits for ever for a link that falls silent, and for a
    program that takes the connection and never answers.
    """
    outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((operation(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = outcome.get(timeout=timeout_seconds)
    except queue.Empty:
        raise TimeoutError(f"it says nothing for {timeout_seconds:g} s") from None
    if error:
        raise error
    return value


def _tell(store: dist.Store, mistake: str) -> None:
    """Leaves a mistake for all machines, and gives them a moment to read it."""
    _ask(store.set, "error", mistake)
    time.sleep(FAREWELL_SECONDS)
