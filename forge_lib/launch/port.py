"""Checks that this machine can listen on the main address and port, before the rendezvous needs them."""

import errno
import socket
import time

from forge_lib.cluster.cluster_file import own_addresses
from forge_lib.errors import UserError
from forge_lib.launch.config import ForgeConfig
from forge_lib.launch.rendezvous import report_to_main_machine
from forge_lib.launch.rendezvous_store import UnavailableError

POLL_SECONDS = 0.25


def check_port(config: ForgeConfig, seconds: float) -> None:
    """Checks that the main address is this machine's and that its port is free, or becomes free within `seconds`.

    Raises:
        UnavailableError: the name does not resolve, or this machine does not have the address.
        UserError: the port is in use, or cannot be used.
    """
    try:
        resolved = socket.getaddrinfo(config.master_addr, config.master_port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        raise UnavailableError(f"--master-addr {config.master_addr}: the name does not resolve") from None
    family, _, _, _, address = resolved[0]
    deadline = time.monotonic() + seconds
    while error := _try_port(family, address):
        if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
            break
        time.sleep(POLL_SECONDS)
    else:
        return
    mistake = _explain(config, error)
    if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) and config.num_nodes > 1:
        mistake = report_to_main_machine(config, mistake)
    raise mistake


def _try_port(family: int, address: tuple) -> OSError | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _explain(config: ForgeConfig, error: OSError) -> UserError:
    host = socket.gethostname()
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"--master-port {config.master_port} is in use on {host}, by another run or another program; give another "
            "port, the same on every machine"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return UnavailableError(
            f"this machine ({host}: {', '.join(sorted(own_addresses()))}) was started as --node-rank 0, but "
            f"--master-addr {config.master_addr} is not its address; number 0 is the main machine, each other machine "
            "needs a different number"
        )
    return UserError(f"--master-port {config.master_port}: {error.strerror} on {host}")
