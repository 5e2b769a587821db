"""check_cluster.py on machines of their own: what it says of broken networks, and what it measures of whole ones."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import TINY, until
from networks import shape

CHECK = [sys.executable, "scripts/check_cluster.py"]
ADDRESSES = {"alice": "10.77.0.1", "bob": "10.77.0.2"}
FORECAST = [*TINY[:2], "--sequence-length", "64", "--batch-size", "4"]
FAKE_CLOCK = "import runpy, sys, time; now = time.time; time.time = lambda: now() + 300; sys.argv = sys.argv[1:]; "
FAKE_VERSION = "import runpy, sys, accelerate; accelerate.__version__ = '1.3.0'; sys.argv = sys.argv[1:]; "
RUN = "runpy.run_path(sys.argv[0], run_name='__main__')"
netns = pytest.mark.netns


@pytest.fixture
def check(start, tmp_path):
    """Starts the check on machines of a rig; returns how it ended on each."""

    def check(
        machines, *flags, addresses=ADDRESSES, names=None, words=None, own_flags=None, hosts_files=None, wait=True
    ) -> list:
        text = "".join(f"  - {{name: {name}, address: {address}}}\n" for name, address in addresses.items())
        (tmp_path / "cluster.yaml").write_text(f"name: lab\ndevice: cpu\nmachines:\n{text}")
        running = []
        for n, name in enumerate(names or addresses, 1):
            prefix = [*machines.on(n), "env", "OMP_NUM_THREADS=1"]
            if hosts_files:
                (tmp_path / f"hosts{n}").write_text(f"127.0.0.1 localhost\n{hosts_files[n - 1]}\n")
                script = 'mount --bind "$0" /etc/hosts && exec "$@"'
                prefix += ["unshare", "--mount", "sh", "-c", script, str(tmp_path / f"hosts{n}")]
            command = (words or {}).get(n, CHECK)
            command = [*command, tmp_path / "cluster.yaml", "--machine", name, *flags, *(own_flags or {}).get(n, [])]
            running.append(start(command, prefix=prefix))
        return [each.finish(120) for each in running] if wait else running

    return check


def on(machines, n: int, *words: str) -> None:
    """Runs a command on machine n."""
    subprocess.run([*machines.on(n), *words], check=True)


def filter_port(machines, verdict: str) -> None:
    """Machine 1 refuses or drops what comes from machine 2 to the cluster's port."""
    on(machines, 1, "nft", "add table ip t")
    on(machines, 1, "nft", "add chain ip t c { type filter hook input priority 0 ; }")
    on(machines, 1, "nft", f"add rule ip t c ip saddr 10.77.0.2 tcp dport 29500 {verdict}")


def drop_large(machines) -> None:
    """What a tunnel with a smaller MTU does whose word about it is filtered."""
    on(machines, 1, "nft", "add table ip t")
    on(machines, 1, "nft", "add chain ip t c { type filter hook input priority 0 ; }")
    on(machines, 1, "nft", "add rule ip t c ip saddr 10.77.0.2 ip length > 600 drop")


def cases() -> dict:
    """Name of the fault -> (what is done to two machines, options of the check, what each of them must say)."""
    no_name = {"addresses": {"alice": "alice.lab", "bob": "10.77.0.2"}, "hosts_files": ["10.77.0.1 alice.lab", ""]}
    wrong = {"addresses": {"alice": "10.77.0.9", "bob": "10.77.0.2"}}
    return {
        "name": (None, no_name, ["from bob to alice: that the name alice.lab does not resolve on bob"] * 2),
        "route": (
            lambda m: on(m, 2, "ip", "route", "add", "unreachable", "10.77.0.1/32"),
            {},
            [
                "bob (10.77.0.2) is missing: alice finds no answer",
                "alice (10.77.0.1) is missing: bob finds no route to 10.77.0.1: the route table of bob has none",
            ],
        ),
        "refused port": (
            lambda m: filter_port(m, "reject with tcp reset"),
            {},
            ["from bob to alice: its port 29500 refused, though the check runs there: a firewall there rejects"] * 2,
        ),
        "filtered port": (
            lambda m: filter_port(m, "drop"),
            {},
            ["from bob to alice: no answer at its port 29500, though it is there: a firewall on the way"] * 2,
        ),
        "prohibited port": (
            lambda m: filter_port(m, "reject with icmp admin-prohibited"),
            {},
            ["from bob to alice: its port 29500 rejected, though it is there: a firewall on the way"] * 2,
        ),
        "large packets dropped": (
            lambda m: drop_large(m),
            {},
            ["port 29500 open, but nothing comes back: packets of full size do not pass (MTU)"] * 2,
        ),
        "other flags": (
            None,
            {"own_flags": {2: ["--batch-size", "8"]}},
            ["bob has --batch-size 8, alice has 32: type the same line on each machine"] * 2,
        ),
        "a mistake on one machine": (
            None,
            {"own_flags": {2: ["--output-dir", "/etc/passwd/runs"]}},
            ["--output-dir /etc/passwd/runs: /etc/passwd is no folder that can be written to"] * 2,
        ),
        "wrong main address": (None, wrong, ["alice: 10.77.0.9 is none of its addresses (10.77.0.1)"] * 2),
        "port taken": (
            None,
            {"words": {1: [sys.executable, "-c", LISTEN]}},
            ["alice: port 29500 is taken by another program"] * 2,
        ),
        "one number twice": (
            None,
            {"names": ["alice", "bob", "bob"]},
            [r"2 machines were started as bob: \S+ \(10.77.0.[23]\) and \S+ \(10.77.0.[23]\)"] * 3,
        ),
        "library version": (
            None,
            {"words": {2: [sys.executable, "-c", FAKE_VERSION + RUN, CHECK[1]]}},
            ["bob has accelerate 1.3.0, alice has "] * 2,
        ),
        "clock": (
            None,
            {"words": {2: [sys.executable, "-c", FAKE_CLOCK + RUN, CHECK[1]]}},
            ["the clock of bob is 300 s ahead of that of alice"] * 2,
        ),
    }


LISTEN = f"""
import socket, subprocess, sys
with socket.create_server(("10.77.0.1", 29500)):
    sys.exit(subprocess.run([*{CHECK!r}, *sys.argv[1:]]).returncode)
"""


@netns
@pytest.mark.networks
@pytest.mark.skipif(not shutil.which("nft"), reason="needs nftables")
@pytest.mark.parametrize("fault", cases())
def test_a_broken_network_is_named_with_its_machine_on_all(check, hosts, table, fault):
    """And within 20 seconds, though the check itself might wait for longer."""
    disturb, options, expected = cases()[fault]
    machines = hosts(len(options.get("names", ADDRESSES)))
    if disturb:
        disturb(machines)
    running = check(machines, "--timeout", 11, wait=False, **options)
    begun = time.monotonic()
    patterns = [re.compile(text if "\\" in text else re.escape(text)) for text in expected]

    def named() -> bool:
        return all(pattern.search(each.log.read_text()) for each, pattern in zip(running, patterns, strict=True))

    logs = "\n=====\n".join(each.log.read_text() for each in running)
    until(named, 20, f"{fault}: {expected}\n{logs}")
    table.add(f"check_cluster: {fault}", "named with its machine, on all machines", time.monotonic() - begun)
    for each, pattern in zip(running, patterns, strict=True):
        ended = each.finish(90)
        assert ended.code == (2 if "output-dir" in ended.output and each is running[1] else 1), ended.output
        if ended.code == 1:
            last = ended.output[ended.output.index("problem: ") :]
            assert pattern.search(last), f"in the report too, whoever ends first: {ended.output}"
            assert last.endswith("lab: not all is well\n")


@netns
@pytest.mark.networks
@pytest.mark.timeout(400)
def test_the_bandwidth_of_a_link_is_right_within_15_percent(check, hosts, table):
    """Of four machines with 20, 100 and twice 1000 Mbit/s; a link has the smaller of its two ends'."""
    machines = hosts(4)
    rates = {"alice": 20, "bob": 100, "carol": 1000, "dave": 1000}
    for n, rate in enumerate(rates.values(), 1):
        shape(machines, n, f"{rate}mbit")
    first, *_ = check(machines, "--json", addresses={**ADDRESSES, "carol": "10.77.0.3", "dave": "10.77.0.4"})
    assert first.code == 0, first.output
    report = json.loads(first.output[first.output.index("{\n") :])
    found = {(link["from"], link["to"]): 8 * link["bytes_per_second"] / 1e6 for link in report["links"]}
    assert len(found) == 12
    for (a, b), megabits in found.items():
        expected = min(rates[a], rates[b])
        table.add(f"check_cluster: link of {expected} Mbit/s", f"measured {megabits:.1f} Mbit/s")
        assert megabits == pytest.approx(expected, rel=0.15), (a, b)


@netns
@pytest.mark.timeout(200)
def test_a_machine_that_comes_late_is_taken_in_and_programs_can_read_the_report(check, hosts, start, tmp_path):
    """bob is missing at first; the report, with its forecast, is the same on both and is JSON."""
    machines = hosts(2)
    alice, bob = check(machines, "--json", *FORECAST, wait=False)
    bob.kill()
    until(lambda: "bob (10.77.0.2) is missing" in alice.log.read_text(), 40, "alice says who is missing")
    words = [*CHECK, tmp_path / "cluster.yaml", "--json", *FORECAST]
    bob = start(words, prefix=[*machines.on(2), "env", "OMP_NUM_THREADS=1"])
    reports = []
    for each in (alice, bob):
        ended = each.finish(150)
        assert ended.code == 0, ended.output
        assert "2 of 2 machines are here: alice, bob" in ended.output
        report = json.loads(ended.output[ended.output.index("{\n") :])
        assert report["well"] and not report["problems"]
        reports.append(report)
    assert reports[0]["forecast"] == reports[1]["forecast"]
    assert reports[0]["links"] == reports[1]["links"]
    here = reports[0]["forecast"]["here"]["ddp"]
    assert here["tokens_per_second"] == pytest.approx(4 * 64 / here["seconds"])
    assert list(reports[0]["forecast"]["such_machines"]) == ["2", "4", "8", "16", "32", "64"]
    assert reports[0]["forecast"]["such_machines"]["8"] is None, "four sequences are too few for eight machines"


@netns
@pytest.mark.networks
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, "cut"])
def test_a_machine_that_is_lost_while_it_is_measured_ends_the_others_with_a_report(check, hosts, table, how):
    machines = hosts(2)
    alice, bob = check(machines, *FORECAST, wait=False)
    until(lambda: "2 of 2 machines are here" in bob.log.read_text(), 40, "they meet")
    time.sleep(3)
    begun = time.monotonic()
    if how == "cut":
        machines.cut(2)
    else:
        psutil.Process(bob.process.pid).send_signal(how)
    ended = alice.finish(90)
    table.add(f"check_cluster: {how} in the measuring", "the other ends with a report", time.monotonic() - begun)
    assert ended.code in (1, 3), ended.output
    assert "bob" in ended.output[ended.output.index("here: alice, bob") + 20 :], ended.output
    assert "newest checkpoint" not in ended.output
    assert "Traceback" not in bob.log.read_text()
    bob.kill()


@netns
@pytest.mark.networks
@pytest.mark.skipif(not shutil.which("nft"), reason="needs nftables")
def test_a_firewall_that_opens_the_port_alone_is_named(check, hosts):
    """gloo's ports are those that the kernel chooses; the machines meet, and the link between them is then refused."""
    machines = hosts(2)
    on(machines, 1, "nft", "add table ip t")
    on(machines, 1, "nft", "add chain ip t c { type filter hook input priority 0 ; }")
    on(machines, 1, "nft", "add rule ip t c tcp dport 32768-60999 tcp flags & (syn | ack) == syn drop")
    for ended in check(machines):
        assert ended.code == 1, ended.output
        assert "from bob to alice: no answer at a port that the kernel chooses, though 29500 is open" in ended.output


@netns
def test_a_public_main_address_is_warned_of_in_one_line(check, hosts):
    machines = hosts(2)
    for n in (1, 2):
        on(machines, n, *f"ip addr add 203.0.113.{n}/24 dev e0".split())
    addresses = {"alice": "203.0.113.1", "bob": "203.0.113.2"}
    for ended in check(machines, addresses=addresses):
        assert ended.code == 0, ended.output
        lines = [line for line in ended.output.splitlines() if "anybody who reaches" in line]
        assert len(lines) == 1 and "203.0.113.1 port 29500" in lines[0]
