"""What happens to peers on machines with their own network; `make elastic` runs these long tests."""

import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import BIN, ROOT, SHORT, until
from disks import tmpfs
from elastic_peers import FLAGS, Peers
from networks import filter_input, shape
from python_library import prepare_library
from run_folders import rows, sha256

pytestmark = [pytest.mark.netns, pytest.mark.elastic, pytest.mark.timeout(3600)]
BATCH_SIZE = int(SHORT[SHORT.index("--batch-size") + 1])
NAMES = ("alder", "birch", "cedar", "doug")


@pytest.fixture
def peers(tmp_path, start, hosts):
    """Starts the first `count` of four machines' peers, with a lighthouse of its own on the first machine."""

    def peers(count: int, *flags, folder: Path = tmp_path) -> Peers:
        made = Peers(folder, start, "--max-steps", 100_000, "--min-peers", count, *flags, machines=hosts(4))
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
    assert three.rounds("alder")[-1]["tokens_lost"] > 0, "what birch had computed"
    three.start("birch")
    back = three.wait_for_round("birch", three.last_round("alder") + 1)["round"]
    go_on(three, NAMES[:3])
    assert back <= three.round_of_event("alder", "peer_joined", "birch") + 2
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
    assert "the lighthouse http://10.77.0.1:29510 is back after" in three.running["alder"].log.read_text()
    three.stop(*NAMES[:3])
    three.check()


def test_another_machine_starts_the_lighthouse_and_the_first_one_none_when_it_is_back(peers):
    flags = ["--lighthouse", "http://10.77.0.1:29510,http://10.77.0.2:29510"]
    three = peers(3, *flags)
    three.light.kill()
    three.kill("alder")
    light = three.start_lighthouse(2)
    go_on(three, ["birch", "cedar"])
    alder = three.start("alder", "--serve-lighthouse")
    three.wait_for_round("alder", three.last_round("birch") + 1)
    go_on(three, NAMES[:3])
    assert "the lighthouse http://10.77.0.2:29510 runs already" in alder.log.read_text()
    three.stop(*NAMES[:3])
    three.check()
    light.kill()


def test_a_joiner_that_cannot_reach_a_peer_does_not_stop_the_others_and_joins_when_it_can(peers):
    four = peers(3)
    filter_input(four.machines, 2, "ip saddr 10.77.0.4 drop")
    doug = four.start("doug")
    until(lambda: "they go on without this peer" in doug.log.read_text(), 200, "doug is left out")
    go_on(four, ["alder", "birch", "cedar"], rounds=5)
    assert "cannot connect to birch" in doug.log.read_text()
    four.machines.call(2, "nft flush chain ip t c")
    four.wait_for_round("doug", four.last_round("alder") + 1, 200)
    go_on(four, NAMES)
    four.stop(*NAMES)
    four.check()


def test_a_joiner_with_a_slow_link_catches_up_with_a_peer_that_makes_short_rounds(peers):
    """An update takes the joiner much longer than ten steps take the other peer, whose rounds so become longer."""
    both = peers(1)
    before = both.rounds("alder")[-1]["round_seconds"]
    shape(both.machines, 2, "2mbit")
    both.start("birch")
    first = both.wait_for_round("birch", 1, 400)["round"]
    assert max(row["round_seconds"] for row in both.rounds("alder") if row["round"] < first) > 3 * before
    go_on(both, NAMES[:2], seconds=120)
    both.stop(*NAMES[:2])
    both.check()


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
    assert "peer_lost" in three.events("alder") and "healed" in three.events("cedar")
    three.stop(*NAMES[:3])
    three.check()


def test_a_link_is_cut_during_an_exchange_and_the_rounds_of_the_peer_with_the_lighthouse_count(tmp_path, start, hosts):
    """Both know afterwards that they cannot connect. The one that goes on alone has the last name of the two."""
    both = Peers(tmp_path, start, "--max-steps", 100_000, "--min-peers", 2, "--sync-every", 10, machines=hosts(2))
    light = both.start_lighthouse()
    for name in ("zelkova", "birch"):
        both.start(name)
    for name in both.places:
        both.wait_for_round(name, 3)
    shape(both.machines, 2, "1mbit")  # an exchange now takes seconds
    go_on(both, ["zelkova", "birch"], seconds=120)

    def sent_bytes() -> int:
        return json.loads(both.machines.call(2, "ip -json -statistics link show e0"))[0]["stats64"]["tx"]["bytes"]

    before = sent_bytes()
    until(lambda: sent_bytes() > before + 100_000, 120, "an exchange has begun")
    last = both.last_round("zelkova")
    both.machines.cut(2)
    for name, other in (("zelkova", "birch"), ("birch", "zelkova")):
        text = f"cannot connect to {other}"
        until(lambda name=name, text=text: text in both.running[name].log.read_text(), 180, f"{name}: {text}")
    both.wait_for_round("zelkova", last + 4, 120)
    shape(both.machines, 2, "100mbit")
    both.machines.heal(2)
    both.wait_for_round("birch", both.last_round("zelkova") + 1, 180)
    go_on(both, ["zelkova", "birch"], seconds=120)
    both.stop("zelkova", "birch")
    both.check()
    light.kill()


def test_two_of_four_peers_are_cut_off_together_for_a_minute(peers):
    four = peers(4)
    for number in (3, 4):
        four.machines.cut(number)
    go_on(four, ["alder", "birch"])
    time.sleep(55)
    for number in (3, 4):
        four.machines.heal(number)
    go_on(four, NAMES)
    assert four.events("alder").count("peer_lost") >= 2
    assert all("healed" in four.events(name) for name in ("cedar", "doug"))
    four.stop(*NAMES)
    four.check()


def test_a_frozen_peer_wakes_and_a_stopped_one_ends_well(peers):
    three = peers(3)
    three.running["birch"].process.send_signal(signal.SIGSTOP)
    assert go_on(three, ["alder", "cedar"]) < 15
    three.running["birch"].process.send_signal(signal.SIGCONT)
    back = three.wait_for_round("birch", three.last_round("alder") + 1)
    assert back["tokens_lost"] > 0, "others went on without what it had computed"
    assert "peer_lost" in three.events("alder") and "healed" in three.events("birch")
    three.running["cedar"].process.send_signal(signal.SIGTERM)
    assert go_on(three, ["alder", "birch"]) < 15
    three.finish("cedar")
    three.stop("alder", "birch")
    three.check()


def test_all_peers_are_killed_and_started_again(peers):
    three = peers(3)
    committed = three.last_round("alder")
    for name in NAMES[:3]:
        three.kill(name)
    for name in NAMES[:3]:
        three.start(name)
    go_on(three, NAMES[:3], seconds=120)
    assert min(row["round"] for row in three.rounds("alder")[-2:]) > committed
    three.stop(*NAMES[:3])
    samples = three.check()
    assert samples[: len(samples) // 2] == list(range(len(samples) // 2)), "none is lost"


def test_the_disk_of_a_peer_is_full_for_a_while(peers, tmp_path):
    with tmpfs(tmp_path / "birch", "256m"):
        three = peers(3, "--checkpoint-every", 50)
        filler = tmp_path / "birch" / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(1 << 16))
        go_on(three, ["alder", "cedar"], rounds=4)
        time.sleep(5)
        birch = three.running["birch"]
        assert birch.process.poll() is None, birch.log.read_text()
        assert "No space left on device" in birch.log.read_text()
        assert "birch" in {each["peer"] for each in three.rounds("alder")[-1]["participants"]}
        filler.unlink()
        three.wait_for_round("birch", three.last_round("alder") + 1)
        three.stop(*NAMES[:3])
        three.check()


def test_random_kills_joins_and_stops_for_ten_minutes(peers, tmp_path):
    """Seeded: 30 events in a run that ends; then a run without them, whose held-out loss it must equal.

    That run has as many peers as the disturbed one had on average, because fewer peers make more steps one after the
    other for the same tokens, which is better. The model has been trained before: with random weights, the number of
    rounds decides more than anything else.
    """
    store = prepare_library(tmp_path)
    model = train_model(store, tmp_path / "before")
    short = peers(4)
    first, *_, last = short.rounds("alder")[1:]
    rate = (last["step"] - first["step"]) / sum(row["round_seconds"] for row in short.rounds("alder")[2:])
    short.stop(*NAMES)
    flags = ["--model-name", model, "--dataset-path", store, "--max-steps", int(660 * rate), "--checkpoint-every", 200]
    flags += ["--eval-fraction", 0.005, "--eval-every", int(60 * rate)]
    four = peers(4, *flags, folder=tmp_path / "disturbed")
    disturb(four, chance=random.Random(13))
    four.finish(*NAMES, seconds=900)
    num_samples = int(660 * rate) * BATCH_SIZE
    assert four.check() == list(range(num_samples)), "each one exactly once"
    assert sum(four.events(name).count("peer_lost") for name in NAMES) > 5
    committed = {row["round"]: len(row["participants"]) for name in NAMES for row in four.rounds(name)}
    num_peers = round(statistics.mean(committed.values()))
    calm = peers(num_peers, *flags, folder=tmp_path / "undisturbed")
    calm.finish(*NAMES[:num_peers], seconds=900)
    losses = [rows(run.folder / "alder", "eval_loss")[-1] for run in (four, calm)]
    print(f"held-out losses, and with {num_peers} peers", losses)
    assert losses[0]["step"] == losses[1]["step"] == int(660 * rate)
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], rel=0.02)
    folders = [tmp_path / "disturbed" / name for name in NAMES]
    assert max(row["tokens_lost"] for folder in folders for row in rows(folder, "tokens_lost")) > 0


def train_model(store: Path, folder: Path) -> Path:
    """Trains the bundled model with train.py for a while; returns its folder."""
    flags = [*SHORT, "--dataset-path", store, "--output-dir", folder, "--batch-size", 16, "--max-steps", 1500]
    flags += ["--lr-scheduler", "constant", "--eval-every", 0, "--checkpoint-every", 0]
    subprocess.run([sys.executable, "scripts/train.py", *map(str, flags)], cwd=ROOT, check=True)
    return folder / "final"


def disturb(four: Peers, chance: random.Random) -> None:
    """Kills, stops and starts peers 30 times in 10 minutes; at the end all four run."""
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
