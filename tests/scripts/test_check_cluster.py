"""check_cluster.py on machines with their own network: what it reports about broken ones and measures on others."""

import json
import re
import shutil
import signal
import sys
import time

import psutil
import pytest
from commands import TINY, until
from networks import Hosts, filter_input, shape

CHECK = [sys.executable, "scripts/check_cluster.py"]
ADDRESSES = {"alice": "10.77.0.1", "bob": "10.77.0.2"}
FORECAST = [*TINY[:2], "--sequence-length", "64", "--batch-size", "4"]
FAKE_CLOCK = "import runpy, sys, time; now = time.time; time.time = lambda: now() + 300; sys.argv = sys.argv[1:]; "
FAKE_VERSION = "import runpy, sys, importlib.metadata as metadata; version = metadata.version; "
FAKE_VERSION += "metadata.version = lambda name: '1.3.0' if name == 'accelerate' else version(name); "
FAKE_VERSION += "sys.argv = sys.argv[1:]; "
RUN = "runpy.run_path(sys.argv[0], run_name='__main__')"
netns = pytest.mark.netns


@pytest.fixture
def check(start, tmp_path):
    """Starts the check on all machines; returns how it ended on each, or the running commands without `wait`."""

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


def filter_port(machines: Hosts, verdict: str) -> None:
    """Machine 1 rejects or drops what machine 2 sends to the cluster's port."""
    filter_input(machines, 1, f"ip saddr 10.77.0.2 tcp dport 29500 {verdict}")


def drop_large_packets(machines: Hosts) -> None:
    """Drops large packets, like a tunnel with a smaller MTU if ICMP is filtered."""
    filter_input(machines, 1, "ip saddr 10.77.0.2 ip length > 600 drop")


def cases() -> dict:
    """Returns, by name of the fault: what is done to the machines, options of the check, what each must print."""
    no_name = {"addresses": {"alice": "alice.lab", "bob": "10.77.0.2"}, "hosts_files": ["10.77.0.1 alice.lab", ""]}
    wrong = {"addresses": {"alice": "10.77.0.9", "bob": "10.77.0.2"}}
    unreachable = "bob cannot reach alice: "
    return {
        "name": (None, no_name, [f"{unreachable}alice.lab does not resolve on bob"] * 2),
        "route": (
            lambda machines: machines.call(2, "ip route add unreachable 10.77.0.1/32"),
            {},
            [
                "bob (10.77.0.2) is missing; alice reports: no answer at port 29500: the machine is off, or a",
                "alice (10.77.0.1) is missing; bob reports: no route to 10.77.0.1",
            ],
        ),
        "refused port": (
            lambda machines: filter_port(machines, "reject with tcp reset"),
            {},
            [f"{unreachable}connection refused at port 29500, but the check runs there: a firewall on alice"] * 2,
        ),
        "filtered port": (
            lambda machines: filter_port(machines, "drop"),
            {},
            [f"{unreachable}no answer at port 29500, but the check runs there: a firewall between them drops"] * 2,
        ),
        "prohibited port": (
            lambda machines: filter_port(machines, "reject with icmp admin-prohibited"),
            {},
            [f"{unreachable}port 29500 is rejected, but the check runs there: a firewall between them"] * 2,
        ),
        "large packets dropped": (
            drop_large_packets,
            {},
            ["port 29500 is open, but no answer arrives: the link drops full-size packets (MTU)"] * 2,
        ),
        "other flags": (
            None,
            {"own_flags": {2: ["--batch-size", "8"]}},
            ["bob has --batch-size 8, alice has 32: use the same flags on each machine"] * 2,
        ),
        "a mistake on one machine": (
            None,
            {"own_flags": {2: ["--output-dir", "/etc/passwd/runs"]}},
            ["--output-dir /etc/passwd/runs: /etc/passwd is not a folder that can be written to"] * 2,
        ),
        "wrong main address": (None, wrong, ["alice: 10.77.0.9 is not an address of this machine (10.77.0.1)"] * 2),
        "port in use": (
            None,
            {"words": {1: [sys.executable, "-c", LISTEN]}},
            ["alice: port 29500 is in use"] * 2,
        ),
        "one name twice": (
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
def test_all_machines_report_a_fault_with_the_machine_that_has_it(check, hosts, table, fault):
    """They do so within 20 seconds of the start."""
    disturb, options, expected = cases()[fault]
    machines = hosts(len(options.get("names", ADDRESSES)))
    if disturb:
        disturb(machines)
    running = check(machines, "--timeout", 11, wait=False, **options)
    begun = time.monotonic()
    patterns = [re.compile(text if "\\" in text else re.escape(text)) for text in expected]

    def is_reported() -> bool:
        return all(pattern.search(each.log.read_text()) for each, pattern in zip(running, patterns, strict=True))

    logs = "\n=====\n".join(each.log.read_text() for each in running)
    until(is_reported, 20, f"{fault}: {expected}\n{logs}")
    table.add(f"check_cluster: {fault}", "reported with its machine, on all machines", time.monotonic() - begun)
    for each, pattern in zip(running, patterns, strict=True):
        ended = each.finish(90)
        assert ended.code == (2 if "output-dir" in ended.output and each is running[1] else 1), ended.output
        if ended.code == 1:
            last = ended.output[ended.output.index("problem: ") :]
            assert pattern.search(last), f"the report has it on each machine: {ended.output}"
            assert re.search(r"\nlab: \d+ problems? found\n$", last)


@netns
@pytest.mark.networks
@pytest.mark.timeout(400)
def test_the_bandwidth_of_each_link_is_measured_within_15_percent(check, hosts, table):
    """Four machines have 20, 100, 1000 and 1000 Mbit/s; a link has the lower rate of its two ends."""
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
def test_a_late_machine_is_included_and_all_print_the_same_json(check, hosts, start, tmp_path):
    """bob is missing at first. The JSON has the measurements and the forecast."""
    machines = hosts(2)
    alice, bob = check(machines, "--json", *FORECAST, wait=False)
    bob.kill()
    until(lambda: "bob (10.77.0.2) is missing" in alice.log.read_text(), 40, "alice reports who is missing")
    words = [*CHECK, tmp_path / "cluster.yaml", "--json", *FORECAST]
    bob = start(words, prefix=[*machines.on(2), "env", "OMP_NUM_THREADS=1"])
    reports = []
    for each in (alice, bob):
        ended = each.finish(150)
        assert ended.code == 0, ended.output
        assert "2 of 2 machines are up: alice, bob" in ended.output
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
def test_a_machine_lost_during_the_measurements_ends_the_others_with_a_report(check, hosts, table, how):
    machines = hosts(2)
    alice, bob = check(machines, *FORECAST, wait=False)
    until(lambda: "2 of 2 machines are up" in bob.log.read_text(), 40, "both are up")
    time.sleep(3)
    begun = time.monotonic()
    if how == "cut":
        machines.cut(2)
    else:
        psutil.Process(bob.process.pid).send_signal(how)
    ended = alice.finish(90)
    table.add(
        f"check_cluster: {how} during the measurements",
        "the other machine ends with a report",
        time.monotonic() - begun,
    )
    assert ended.code in (1, 3), ended.output
    assert "bob" in ended.output[ended.output.index("up: alice, bob") + 20 :], ended.output
    assert "newest checkpoint" not in ended.output
    assert "Traceback" not in bob.log.read_text()
    bob.kill()


@netns
@pytest.mark.networks
@pytest.mark.skipif(not shutil.which("nft"), reason="needs nftables")
def test_a_firewall_that_opens_only_the_clusters_port_is_reported(check, hosts):
    """The machines reach each other at the cluster's port, but not at a port that the kernel chooses, as for gloo."""
    machines = hosts(2)
    filter_input(machines, 1, "tcp dport 32768-60999 tcp flags & (syn | ack) == syn drop")
    for ended in check(machines):
        assert ended.code == 1, ended.output
        assert (
            "bob cannot reach alice: no answer at a port that the kernel chooses, although port 29500 is open"
            in ended.output
        )


@netns
def test_a_public_main_address_gives_one_warning(check, hosts):
    machines = hosts(2)
    for n in (1, 2):
        machines.call(n, f"ip addr add 203.0.113.{n}/24 dev e0")
    addresses = {"alice": "203.0.113.1", "bob": "203.0.113.2"}
    for ended in check(machines, addresses=addresses):
        assert ended.code == 0, ended.output
        lines = [line for line in ended.output.splitlines() if "anyone who can reach" in line]
        assert len(lines) == 1 and "203.0.113.1 port 29500" in lines[0]
