"""A run over WireGuard, set up by make_configs.py: its losses, the packets on its link, and who reaches its ports."""

import json
import os
import shutil
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import BIN, QUIET, ROOT, SHORT, Running, until
from made_configs import make_configs, printed_commands
from marked_processes import workers
from networks import Hosts
from run_folders import losses, sha256, wait_for_step

from forge_lib.process import is_running

NAMES = [f"{name}-{os.getpid()}" for name in ("alice", "bob")]  # wireguard-go's sockets are in no namespace
LAB = f"""
name: home-lab
device: cpu
mixed_precision: no
machines:
  - {{name: {NAMES[0]}, address: 10.77.0.1}}
  - {{name: {NAMES[1]}, address: 10.77.0.2}}
wireguard: {{subnet: 10.88.0.0/24, port: 51820}}
"""
TOOLS = ("wg-quick", "wireguard-go", "nft", "tcpdump", "ss")
STRANGER = 3
OPEN = 8000  # a port that no run uses and the firewall leaves open
BEGUN, STEPS = 10, 20  # one machine trains the first steps alone, both the rest over WireGuard
FLAGS = [*SHORT, *QUIET, "--max-steps", STEPS, "--checkpoint-every", BEGUN, "--keep-checkpoints", STEPS // BEGUN]
PIECE = 64  # bytes
WINDOW = 1 << 24  # of a capture, searched at once
LISTEN = f"""
import signal, socket

both = socket.has_dualstack_ipv6()
listener = socket.create_server(("", {OPEN}), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
signal.pause()
"""
# Prints which [address, port] pairs of its argument accept a connection.
SCAN = """
import concurrent.futures, json, socket, sys

def takes(target):
    try:
        socket.create_connection(target, timeout=1.5).close()
    except OSError:
        return False
    return True

targets = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps([target for target, taken in zip(targets, pool.map(takes, targets)) if taken]))
"""


@pytest.fixture
def machines(hosts, start):
    """Two machines, and a stranger on the same switch who has a route to the overlay's addresses."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    missing += [] if Path("/dev/net/tun").exists() else ["/dev/net/tun"]
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {', '.join(missing)}")
    made = hosts(3)
    for n in (1, 2):
        call(made.on(STRANGER), "ip", "route", "add", f"10.88.0.{n}", "via", f"10.77.0.{n}")
        start([sys.executable, "-c", LISTEN], prefix=made.on(n))
        until(lambda n=n: listening(made.on(n)), 10, "somebody listens")
    yield made
    for n, name in enumerate(NAMES, 1):  # wireguard-go lives as long as its interface
        subprocess.run([*made.on(n), "ip", "link", "del", name], capture_output=True)
    until(lambda: not daemons(), 10, f"wireguard-go ends, but {daemons()}")


def daemons() -> list[psutil.Process]:
    """The running processes of wireguard-go that serve this test."""
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if {*NAMES} & {*(each.info["cmdline"] or [])} and is_running(each)]


def call(prefix: list[str], *words) -> str:
    """Runs a command that must succeed; returns what it prints."""
    ended = subprocess.run([*prefix, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def bring_up(machines: Hosts, folder: Path) -> list[list[str]]:
    """Makes keys and files on each machine, as in the README, and runs the printed commands.

    Returns:
        The command that starts the run on each machine.
    """
    (folder / "cluster.yaml").write_text(LAB)
    printed = {}
    for n in (1, 2, 1):  # at first the second machine's key is missing
        flags = (folder / "cluster.yaml", "--output-dir", folder / NAMES[n - 1], "--keys", folder / "keys")
        ended = make_configs(*flags, prefix=machines.on(n))
        assert ended.returncode == 0, ended.stderr
        printed[n] = printed_commands(ended.stdout)
    assert sorted(path.name for path in (folder / "keys").iterdir()) == [f"{name}.pub" for name in NAMES]
    for n, name in enumerate(NAMES, 1):
        secrets = [path for path in (folder / name).iterdir() if path.suffix in (".key", ".conf")]
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in secrets}
        assert modes == {f"{name}.key": 0o600, f"{name}.conf": 0o600}
        assert printed[n][0][:2] == ["wg-quick", "up"]
        call(machines.on(n), *printed[n][0])
    return [printed[n][1 + n] for n in (1, 2)]


def take_down(machines: Hosts, folder: Path) -> None:
    """Removes the overlay and its firewall, and checks that nothing remains."""
    for n, name in enumerate(NAMES, 1):
        call(machines.on(n), "wg-quick", "down", folder / name / f"{name}.conf")
        assert not call(machines.on(n), "nft", "list", "ruleset")
    until(lambda: not daemons(), 10, f"wireguard-go ends, but {daemons()}")


def capture(start, prefix: list[str], interface: str, path: Path, *words) -> Running:
    """Starts to write the packets on an interface to a file."""
    running = start(["tcpdump", "-i", interface, "-w", path, "-B", 1 << 16, "-Z", "root", *words], prefix=prefix)
    until(lambda: "listening on" in running.log.read_text(), 10, "tcpdump listens")
    return running


def addresses(machines: Hosts, n: int) -> list[str]:
    """All addresses by which the stranger may reach a machine, including the link-local one."""
    (link,) = json.loads(call(machines.on(n), "ip", "-json", "address", "show", "e0"))
    own = [f"{one['local']}%e0" for one in link["addr_info"] if one["family"] == "inet6"]
    return [f"10.77.0.{n}", f"10.88.0.{n}", *own]


def listening(prefix: list[str]) -> set[int]:
    """The TCP ports on which a machine listens."""
    lines = call(prefix, "ss", "-Htln").splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in lines}


def scan(prefix: list[str], targets: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
    """Returns which (address, port) can be reached from a machine."""
    return set(map(tuple, json.loads(call(prefix, sys.executable, "-c", SCAN, json.dumps([*targets])))))


def only_machines_reach(machines: Hosts) -> None:
    """Checks that the stranger reaches no port of the run, at no address, and the machines of the run reach all."""
    ports = {n: listening(machines.on(n)) for n in (1, 2)}
    assert 29500 in ports[1] and all(len(found - {29500, OPEN}) > 0 for found in ports.values()), "gloo's are others"
    targets = {(address, port) for n in (1, 2) for address in addresses(machines, n) for port in ports[n]}
    assert scan(machines.on(STRANGER), targets) == {(address, port) for address, port in targets if port == OPEN}
    for n, other in ((1, 2), (2, 1)):
        own = {(f"10.88.0.{n}", port) for port in ports[n]}
        assert scan(machines.on(other), own) == own, "a machine of the run reaches them all"


def train_over_it(machines: Hosts, start, lines: list[list[str]], folders: list[Path]) -> str:
    """Continues the first machine's run on both; the second has no data. Returns the first one's output."""
    word, running = uuid.uuid4().hex, []
    home = folders[1].parent / "home"
    home.mkdir()
    places = [[], [f"HOME={home}", f"HF_HOME={home / 'huggingface'}"]]
    flags = [FLAGS, [*FLAGS, "--dataset-path", home / "nothing"]]
    for n, words in enumerate(lines):
        prefix = [*machines.on(n + 1), "env", "OMP_NUM_THREADS=1", f"RIG={word}", *places[n]]
        running.append(start([*words, *flags[n], "--output-dir", folders[n]], prefix=prefix))
    wait_for_step(folders[0], BEGUN + 3)
    held = workers(word)
    assert set(held) == {0, 1}, running[0].log.read_text()
    for worker in held.values():  # so that the run does not end meanwhile; the kernel accepts connections for it
        worker.suspend()
    only_machines_reach(machines)
    for worker in held.values():
        worker.resume()
    ended = [each.finish(120) for each in running]
    assert [each.code for each in ended] == [0, 0], ended[0].output + ended[1].output
    return ended[0].output


def pieces_of(*paths: Path) -> set[bytes]:
    """Returns the files in pieces of 64 bytes, without pieces that repeat one byte."""
    found = set()
    for content in (path.read_bytes() for path in paths):
        found |= {content[place : place + PIECE] for place in range(0, len(content) - PIECE + 1, PIECE)}
    return {piece for piece in found if len(set(piece)) > 1}


def find(pieces: set[bytes], path: Path) -> set[bytes]:
    """Returns the pieces that a file contains, at any offset."""
    heads = np.frombuffer(b"".join(piece[:8] for piece in pieces), np.uint32).reshape(-1, 2) >> 8
    first, second = np.zeros((2, 1 << 24), bool)  # by three bytes: whether a piece has them at this place
    first[heads[:, 0]] = second[heads[:, 1]] = True
    found = set()
    with open(path, "rb") as file:
        for window in range(0, path.stat().st_size, WINDOW):
            file.seek(window)
            content = file.read(WINDOW + PIECE)
            for offset in range(4):
                words = np.frombuffer(content, np.uint32, (len(content) - offset) // 4, offset) >> 8
                places = offset + 4 * np.flatnonzero(first[words[:-1]] & second[words[1:]])
                found |= pieces & {content[place : place + PIECE] for place in places.tolist()}
    return found


def not_wireguard(machines: Hosts, path: Path) -> str:
    """Lists the packets of a capture that are neither WireGuard's nor neighbour discovery.

    The stranger's packets are left out.
    """
    (link,) = json.loads(call(machines.on(STRANGER), "ip", "-json", "link", "show", "e0"))
    neighbours = "arp or icmp6 or (ip6[6] == 0 and ip6[40] == 58)"  # the last: ICMPv6 behind a hop-by-hop header
    return call(
        [], "tcpdump", "-nn", "-r", path, f"not (udp port 51820 or {neighbours} or ether host {link['address']})"
    )


@pytest.mark.alone
@pytest.mark.netns
@pytest.mark.timeout(240)
def test_over_wireguard_losses_are_unchanged_and_nobody_else_reads_or_reaches_the_run(machines, start, run, tmp_path):
    """Token store, checkpoint and gradients are sent; the same search finds the first two inside the tunnel."""
    alone, folders = tmp_path / "alone", [tmp_path / name for name in ("run1", "run2")]
    ended = run([sys.executable, "scripts/train.py", *FLAGS, "--output-dir", alone], warm=True)
    assert ended.code == 0, ended.output
    begun = Path("checkpoints") / f"step-{BEGUN:08d}"
    shutil.copytree(alone / begun, folders[0] / begun)
    lines = bring_up(machines, tmp_path)
    link, tunnel = tmp_path / "link.pcap", tmp_path / "tunnel.pcap"
    first = ("-c", 20000, "src", "10.88.0.1")  # store and checkpoint come before the gradients
    captures = [capture(start, machines.on(2), "e0", link), capture(start, machines.on(2), NAMES[1], tunnel, *first)]
    output = train_over_it(machines, start, lines, folders)
    for n, name in enumerate(NAMES, 1):
        assert f"[10.88.0.{n} {name}]" in output
    assert losses(folders[0]) == pytest.approx(losses(alone)[BEGUN:], rel=1e-4)
    for each in captures:
        if each.process.poll() is None:
            each.process.terminate()
        ended = each.finish(20)
        assert ended.code == 0 and "\n0 packets dropped by kernel" in ended.output, ended.output
    take_down(machines, tmp_path)

    final = folders[0] / "final" / "model.safetensors"
    assert link.stat().st_size > 2 * (STEPS - BEGUN) * final.stat().st_size, "each way the gradients, as large as that"
    assert not_wireguard(machines, link) == ""
    (store,) = (folders[1].parent / "home").rglob("tokens.bin")
    travelled = [store, *(folders[1] / begun).glob("*.safetensors")]
    assert len(travelled) == 3
    for path in travelled:
        pieces = pieces_of(path)
        assert len(find(pieces, tunnel)) > len(pieces) / 2, path.name
    in_clear = find(pieces_of(*travelled, final), link)
    assert not in_clear
    for path in (link, tunnel):  # a third of a gigabyte
        path.unlink()


@pytest.mark.elastic
@pytest.mark.netns
@pytest.mark.timeout(600)
def test_peers_train_over_wireguard_with_nothing_but_the_cluster_file(machines, start, tmp_path):
    """The second machine has no data; the stranger reaches neither the lighthouse nor a peer."""
    bring_up(machines, tmp_path)
    link, running = tmp_path / "link.pcap", []
    captured = capture(start, machines.on(2), "e0", link)
    command = [BIN / "p2p-llm-forge", "--elastic", "--cluster", tmp_path / "cluster.yaml", "--min-peers", 2]
    for n, more in ((1, []), (2, ["--dataset-path", tmp_path / "nothing"])):
        words = [*command, *SHORT, *QUIET, "--max-steps", 2000, *more, "--output-dir", tmp_path / f"run{n}"]
        running.append(start(words, prefix=[*machines.on(n), "env", "OMP_NUM_THREADS=1"]))
    until(lambda: "round 3 " in running[1].log.read_text(), 120, "both train")
    ports = {n: listening(machines.on(n)) for n in (1, 2)}
    assert {29510, 29511, 29512} <= ports[1] and {29511, 29512} <= ports[2]
    targets = {(address, port) for n in (1, 2) for address in addresses(machines, n) for port in ports[n]}
    assert scan(machines.on(STRANGER), targets) == {(address, port) for address, port in targets if port == OPEN}
    ended = [each.finish(240) for each in running]
    assert [each.code for each in ended] == [0, 0], "\n\n".join(each.output for each in ended)
    assert len({sha256(tmp_path / f"run{n}" / "final" / "model.safetensors") for n in (1, 2)}) == 1
    captured.process.terminate()
    assert captured.finish(20).code == 0
    take_down(machines, tmp_path)
    assert link.stat().st_size > 100_000 and not_wireguard(machines, link) == ""
    link.unlink()
