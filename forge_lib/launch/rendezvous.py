"""Checks which machines are up, over the main machine's port, before any launcher starts.

It names at once a missing machine, a machine number that is used twice, a port in use and a machine that cannot be
reached. accelerate's launcher would wait for ten minutes without a message.
"""

import dataclasses
import json
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

import torch.distributed as dist

from forge_lib.distributed.store import keys_of_attempt, store_verdict
from forge_lib.distributed.verdicts import Verdict
from forge_lib.errors import UserError, explain_connection_error, first_line
from forge_lib.launch.config import ForgeConfig
from forge_lib.launch.messages import Waiting
from forge_lib.launch.rendezvous_store import RendezvousStore, UnavailableError

REACH_SECONDS = 20  # how long a machine tries to reach the main machine, and waits for its answer
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Registration:
    """What a machine stores under its number.

    Attributes:
        id: of its supervisor; it differs for two machines with the same number.
        host: its host name.
        num_nodes: its --num-nodes.
    """

    id: str
    host: str
    num_nodes: int

    def to_json(self) -> str:
        """Returns it as it is stored."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Registration":
        """Reads a stored one."""
        return cls(**json.loads(text))


class Rendezvous:
    """One machine's part: it registers its number and waits for the other machines.

    Args:
        config: of this machine.
        machine_id: of its supervisor.
        hosts: host names by machine number, from the previous attempt; messages name them.
        keep_trying: whether to wait for a missing machine until the deadline, because restarts are allowed. If not,
            a main machine that cannot be reached is a user mistake after REACH_SECONDS.
        deadline: of time.monotonic(), for keep_trying.
        pipe: to the supervisor.
    """

    def __init__(
        self,
        config: ForgeConfig,
        machine_id: str,
        hosts: dict[int, str],
        keep_trying: bool,
        deadline: float,
        pipe: Connection,
    ):
        self.config, self.hosts, self.pipe = config, hosts, pipe
        self.keep_trying, self.deadline = keep_trying, deadline
        self.own = Registration(machine_id, socket.gethostname(), config.num_nodes)
        host = f"{hosts[0]} at " if 0 in hosts else ""
        self.main_machine = f"the main machine {host}{config.master_addr}:{config.master_port}"

    def join(self) -> dict[int, str]:
        """Waits for all machines; returns their host names by number. Then the port is free for accelerate's launcher.

        Raises:
            UnavailableError: the main machine cannot be reached, or a machine is missing after `join_timeout`.
            UserError: a number is used twice, or another machine has reported a mistake.
        """
        try:
            return self._join()
        except (dist.DistError, OSError) as error:
            who = self.main_machine if self.config.node_rank else "another machine"
            raise UnavailableError(f"lost {who}: {first_line(error)}; see the message there") from None

    def _join(self) -> dict[int, str]:
        config = self.config
        connection = self._connect() if config.node_rank else None
        try:
            store = RendezvousStore(config, open_seconds=REACH_SECONDS / 2, is_master=config.node_rank == 0)
        except UnavailableError as error:
            raise (error if config.node_rank else report_to_main_machine(config, error)) from None
        if self.keep_trying:
            self._end_previous_attempt(store)
        self._register(store)
        self._wait_for_machines(store)
        registered = [Registration.from_json(store.get(f"node/{n}")) for n in range(config.num_nodes)]
        for each in registered:  # also here: one that differs has registered before it reports that
            self._check_num_nodes(store, each, registered[0])
        store.set(f"ready/{config.node_rank}", "")
        if connection:
            connection.settimeout(REACH_SECONDS)
            connection.recv(1)  # returns when the main machine has closed its store
            connection.close()
        else:
            store.wait([f"ready/{n}" for n in range(config.num_nodes)], REACH_SECONDS)
        return {n: registration.host for n, registration in enumerate(registered)}

    def _connect(self) -> socket.socket:
        """Returns a connection to the main machine, which stays open until the main machine closes its store."""
        config = self.config
        seconds = config.join_timeout if self.keep_trying else REACH_SECONDS
        deadline = self._deadline(REACH_SECONDS)
        while True:
            try:
                return socket.create_connection((config.master_addr, config.master_port), timeout=5)
            except OSError as error:
                what, cause = explain_connection_error(error)
                if isinstance(error, socket.gaierror) and not self.keep_trying:
                    raise UserError(f"--master-addr {config.master_addr}: {what}; {cause}") from None
                if isinstance(error, ConnectionRefusedError):
                    cause += "; start the main machine (--node-rank 0) first"
            if time.monotonic() > deadline:
                raise UnavailableError(f"cannot reach {self.main_machine} for {seconds:g} s: {what}; {cause}")
            if self.keep_trying:
                self._report_waiting(f"{self.main_machine}: {what}")
            time.sleep(1)

    def _end_previous_attempt(self, store: RendezvousStore) -> None:
        """Ends processes of the previous attempt that still use this port and wait for a process that is gone."""
        verdict = Verdict("lost", -1, f"lost the processes on {self.own.host}, which starts again", self.own.host)
        store.call(lambda whole: store_verdict(keys_of_attempt(whole, 0), verdict))

    def _register(self, store: RendezvousStore) -> None:
        """Registers this machine under its number.

        Raises:
            UserError: another machine has it, or the machines disagree about --num-nodes; all machines raise this.
        """
        config, own = self.config, self.own
        holder = Registration.from_json(store.set_first(f"node/{config.node_rank}", own.to_json()))
        deadline = self._deadline(REACH_SECONDS)
        while not store.has("node/0"):
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self.main_machine} answers, but does not take part in the rendezvous")
            self._report_waiting(f"{self.main_machine}: its previous attempt has not ended")
            time.sleep(POLL_SECONDS)
        main = Registration.from_json(store.get("node/0"))
        if holder.id != own.id:
            self._refuse(
                store, f"two machines were started as --node-rank {config.node_rank}: {holder.host} and {own.host}"
            )
        self._check_num_nodes(store, own, main)

    def _check_num_nodes(self, store: RendezvousStore, machine: Registration, main: Registration) -> None:
        if machine.num_nodes != main.num_nodes:
            self._refuse(
                store,
                f"{machine.host} was started with --num-nodes {machine.num_nodes}, the main machine {main.host} with "
                f"{main.num_nodes}; give all machines the same number",
            )

    @staticmethod
    def _refuse(store: RendezvousStore, mistake: str) -> NoReturn:
        """Raises a mistake of the user on all machines."""
        store.report_mistake(mistake)
        raise UserError(mistake)

    def _wait_for_machines(self, store: RendezvousStore) -> None:
        config = self.config
        deadline = self._deadline(config.join_timeout)
        while missing := [n for n in range(config.num_nodes) if not store.has(f"node/{n}")]:
            self._check_mistake(store)
            names = [f"{n} ({self.hosts[n]})" if n in self.hosts else str(n) for n in missing]
            who = f"machine{'s' if len(missing) > 1 else ''} {', '.join(names)} of {config.num_nodes}"
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{who} did not start within --join-timeout {config.join_timeout:g} s; start the command there too"
                )
            self._report_waiting(f"{who} (--node-rank) at {config.master_addr}:{config.master_port}")
            time.sleep(POLL_SECONDS)
        self._check_mistake(store)

    def _check_mistake(self, store: RendezvousStore) -> None:
        """Raises the mistake that another machine has reported."""
        try:
            mistake = store.reported_mistake()
        except dist.DistError:
            raise UnavailableError(f"{self.main_machine} has stopped; see the message there") from None
        if mistake:
            if self.config.node_rank == 0:
                store.let_others_read()
            raise UserError(mistake)

    def _deadline(self, seconds: float) -> float:
        return self.deadline if self.keep_trying else time.monotonic() + seconds

    def _report_waiting(self, whom: str) -> None:
        self.pipe.send(Waiting(f"{self.own.host} waits for {whom}"))


def report_to_main_machine(config: ForgeConfig, mistake: UserError) -> UserError:
    """Returns the mistake of a machine with number 0, after reporting it to another one with that number, if any."""
    try:
        store = RendezvousStore(config, open_seconds=3)
        store.wait(["node/0"], 3)
    except (UserError, dist.DistError, OSError):
        return mistake  # the program at that address is not a rendezvous
    mistake = UserError(f"two machines were started as --node-rank 0: {mistake}")
    store.report_mistake(str(mistake))
    return mistake
