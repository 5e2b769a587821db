"""What happens to peers on machines with their own network; `make elastic` runs these long tests."""

import random
import signal
import time

import pytest
from commands import BIN
from elastic_peers import FLAGS, Peers
from run_folders import rows, sha256

pytestmark = [pytest.mark.netns, pytest.mark.elastic, pytest.mark.timeout(1800)]
NAMES = ("alder", "birch", "cedar", "doug")


@pytest.fixture
def peers(tmp_path, start, hosts):
    """Starts the first `count` of four machines' peers, with a lighthouse of its own on the first machine."""

    def peers(count: int, *flags) -> Peers:
        made = Peers(tmp_path, start, "--max-steps", 100_000, "--min-peers", count, *flags, machines=hosts(4))
        made.light = made.start_lighthouse()
        for name in NAMES[:count]:
            made.start(name)
        for name in NAMES[:count]:
            made.wait_for_round(name, 3)
        return made

    return peers


def go_on(peers: Peers, names, rounds: int = 2, seconds: float = 60) -> float:
    """Waits until peers have committed more rounds; returns the seconds until the first one has its next round."""
    begun, last = time.monotonic(), max(map(peers.last_round, names))
    peers.wait_for_round(names[0], last + 1, seconds)
    first = time.monotonic() - begun
    for name in names:
        peers.wait_for_round(name, last + rounds, seconds)
    return first


def test_others_commit_soon_after_a_kill_and_the_killed_peer_is_back_within_two_rounds(peers):
    three = peers(3)
    three.kill("birch")
    assert go_on(three, ["alder", "cedar"]) < 15
    three.start("birch")
    three.wait_for_round("birch", three.last_round("alder") + 1)
    go_on(three, NAMES[:3])
    three.stop(*NAMES[:3])
    three.check()


def test_a_peer_joins_with_an_empty_folder_over_a_link_that_is_cut_meanwhile(peers, tmp_path):
    four = peers(3)
    joining = four.start("doug", "--dataset-path", tmp_path / "nothing")
    while "received updates" not in joining.log.read_text() and "receiving" not in joining.log.read_text():
        assert joining.process.poll() is None, joining.log.read_text()
        time.sleep(0.02)
    four.machines.cut(4)
    time.sleep(10)
    four.machines.heal(4)
    first = four.wait_for_round("doug", 1)["round"]
    for name in NAMES:
        four.wait_for_round(name, first + 2)
    four.stop(*NAMES)
    four.check()


def test_the_lighthouse_is_killed_and_started_again(peers):
    three = peers(3)
    three.light.kill()
    time.sleep(30)
    stood = three.last_round("alder")
    time.sleep(3)
    assert three.last_round("alder") == stood, "they wait"
    assert "waiting for the lighthouse http://10.77.0.1:29510" in three.running["alder"].log.read_text()
    three.light = three.start_lighthouse()
    go_on(three, NAMES[:3])
    three.stop(*NAMES[:3])
    three.check()


def test_one_command_per_machine_of_a_cluster_file(hosts, start, tmp_path):
    """The second machine runs the lighthouse; a third one, which is not in the file, joins."""
    machines, running = hosts(3), []
    lab = "name: lab\nlighthouse: birch\nmachines:\n"
    lab += "".join(f"  - {{name: {name}, address: 10.77.0.{n}}}\n" for n, name in enumerate(NAMES[:2], 1))
    (tmp_path / "cluster.yaml").write_text(lab)
    command = [BIN / "p2p-llm-forge", "--elastic", *FLAGS, "--max-steps", 300, "--device", "cpu"]
    where = {name: ["--cluster", tmp_path / "cluster.yaml", "--min-peers", 2] for name in NAMES[:2]}
    where["cedar"] = ["--lighthouse", "http://10.77.0.2:29510", "--dataset-path", tmp_path / "nothing"]
    for n, (name, flags) in enumerate(where.items(), 1):
        prefix = [*machines.on(n), "env", "OMP_NUM_THREADS=1"]
        running.append(start([*command, *flags, "--output-dir", tmp_path / name], prefix=prefix))
    ended = [each.finish(240) for each in running]
    assert [each.code for each in ended] == [0, 0, 0], "\n\n".join(each.output for each in ended)
    assert len({sha256(tmp_path / name / "final" / "model.safetensors") for name in where}) == 1
    names = {each["peer"] for row in rows(tmp_path / "alder", "participants") for each in row["participants"]}
    assert names >= {"alder", "birch"}


def test_a_link_is_cut_for_20_seconds(peers):
    three = peers(3)
    three.machines.cut(3)
    go_on(three, ["alder", "birch"])
    time.sleep(15)
    three.machines.heal(3)
    three.wait_for_round("cedar", three.last_round("alder") + 1)
    go_on(three, NAMES[:3])
    three.stop(*NAMES[:3])
    three.check()


def test_two_of_four_peers_are_cut_off_together_for_a_minute(peers):
    four = peers(4)
    for number in (3, 4):
        four.machines.cut(number)
    go_on(four, ["alder", "birch"])
    time.sleep(55)
    for number in (3, 4):
        four.machines.heal(number)
    go_on(four, NAMES)
    four.stop(*NAMES)
    four.check()


def test_a_frozen_peer_wakes_and_a_stopped_one_ends_well(peers):
    three = peers(3)
    three.running["birch"].process.send_signal(signal.SIGSTOP)
    assert go_on(three, ["alder", "cedar"]) < 15
    three.running["birch"].process.send_signal(signal.SIGCONT)
    three.wait_for_round("birch", three.last_round("alder") + 1)
    three.stop("cedar")
    go_on(three, ["alder", "birch"])
    three.stop("alder", "birch")
    three.check()


def test_random_kills_joins_and_stops_for_ten_minutes(peers, tmp_path):
    """Seeded: 30 events. All peers that are left end with equal weights, and no sample is committed twice."""
    chance = random.Random(13)
    four = peers(4, "--eval-fraction", "0.02", "--checkpoint-every", 200)
    end = time.monotonic() + 600
    for number in range(30):
        time.sleep(max(0.0, (end - time.monotonic()) / (30 - number) * chance.uniform(0.5, 1.0)))
        there = list(four.running)
        away = [name for name in NAMES if name not in there]
        if away and (len(there) < 3 or chance.random() < 0.5):
            four.start(chance.choice(away))
        elif chance.random() < 0.5:
            four.kill(chance.choice(there))
        else:
            four.stop(chance.choice(there))
    for name in NAMES:
        if name not in four.running:
            four.start(name)
    go_on(four, NAMES, seconds=120)
    four.stop(*NAMES)
    samples = four.check()
    assert samples[: len(samples) // 2] == list(range(len(samples) // 2))
    assert max(row["tokens_lost"] for name in NAMES for row in rows(tmp_path / name, "tokens_lost")) > 0
