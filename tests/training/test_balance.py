"""How the shares of the processes follow their speeds."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from forge_lib.config import TrainConfig
from forge_lib.data.batches import fit_shares
from forge_lib.errors import UserError
from forge_lib.process import World
from forge_lib.training.balance import CALM_STEPS, SKIPPED_STEPS, WINDOW, Balancer


def make(batch_size: int, count: int, **flags) -> tuple[Balancer, list[dict]]:
    """Returns a balancer of processes on machines of their own, and the events that it logs."""
    events: list[dict] = []
    config = TrainConfig(model_name="-", dataset_path="-", output_dir="-", batch_size=batch_size, **flags)
    balancer = Balancer(config, World(0, count))
    hosts = [f"host{n}" for n in range(count)]
    processes = [SimpleNamespace(host=host, device_name="cpu") for host in hosts]
    session = SimpleNamespace(hosts=hosts, agreement=SimpleNamespace(processes=processes))
    balancer.start(session, SimpleNamespace(write=lambda **row: events.append(row)), {}, {})
    return balancer, events


def run(
    balancer: Balancer, speeds: list[float], num_steps: int, noise: float = 0.0, fixed: float = 0.0, seed: int = 0
):
    """Simulates steps of processes that compute so many sequences per second; returns the shares of each step."""
    random_, seen, seconds = random.Random(seed), [], None
    for step in range(num_steps):
        used = list(balancer.shares)
        seen.append(used)
        balancer.add(step + 1, seconds or [0.0] * len(speeds))
        seconds = [
            (fixed + share / speed) * random_.lognormvariate(0, noise)
            for share, speed in zip(used, speeds, strict=True)
        ]
    return seen


@pytest.mark.parametrize(
    ("speeds", "best"), [((3, 1), [12, 4]), ((1, 2), [5, 11]), ((1, 5), [3, 13]), ((1, 2, 3), [3, 6, 9])]
)
def test_the_shares_follow_the_speeds_and_then_stay(speeds, best):
    size = 16 if len(speeds) == 2 else 18
    balancer, events = make(size, len(speeds))
    seen = run(balancer, list(speeds), 100, noise=0.05)
    assert seen[-1] == pytest.approx(best, abs=1) and sum(seen[-1]) == size
    assert len(events) <= 2 and seen[SKIPPED_STEPS + 2 * WINDOW + 3] != [size // len(speeds)] * len(speeds)


def test_equal_machines_keep_equal_shares_also_if_they_are_noisy():
    for seed in range(20):
        balancer, events = make(16, 2)
        run(balancer, [1.0, 1.0], 200, noise=0.15, seed=seed)
        assert len(events) <= 1


def test_equal_machines_whose_speeds_wander_keep_their_shares():
    """Each speed falls by up to 30 % for 5 to 25 steps, as on a machine that others use too."""
    for seed in range(10):
        random_, factors = random.Random(seed), [[], []]
        for each in factors:
            while len(each) < 200:
                each += [random_.uniform(0.7, 1)] * random_.randint(5, 25)
        balancer, events = make(12, 2)
        seconds = [0.0, 0.0]
        for step in range(200):
            used = list(balancer.shares)
            balancer.add(step + 1, seconds)
            seconds = [share / factor[step] for share, factor in zip(used, factors, strict=True)]
        assert not [row for row in events if row["event"] == "shares"]


def test_a_machine_that_slows_down_gives_its_share_away_within_20_steps_and_is_named_once(caplog):
    balancer, _ = make(16, 2)
    run(balancer, [1.0, 1.0], 60, noise=0.03)
    seen = run(balancer, [1.0, 0.33], 80, noise=0.03)
    assert seen[20] == pytest.approx([12, 4], abs=1)
    assert all(each == seen[20] for each in seen[20:70]), "no change in the next 50 steps"
    assert caplog.text.count("times as long as before") == 1 and "process 1 on host1" in caplog.text


def test_soon_after_a_change_only_a_large_gain_changes_the_shares_again():
    for speed, num_changes in ((1 / 4.2, 0), (1.0, 1)):
        balancer, events = make(16, 2)
        run(balancer, [1.0, 1 / 3], 20)
        assert [row["shares"] for row in events] == [[12, 4]]
        run(balancer, [1.0, speed], 50)
        assert len(events) - 1 == num_changes
    run(balancer, [1.0, 1 / 1.4], 70)
    assert len(events) == 3, "later, a small gain is enough"
    assert 50 - events[1]["step"] + events[2]["step"] >= CALM_STEPS


def test_fixed_costs_do_not_make_the_shares_oscillate():
    balancer, events = make(16, 2)
    run(balancer, [3.0, 1.0], 300, noise=0.03, fixed=1.0)
    assert len(events) <= 3


def test_it_is_on_by_itself_only_with_several_machines_and_never_with_given_shares():
    assert make(16, 2)[0].is_on and not make(16, 2, shares="1:1")[0].is_on and not make(16, 2, balance="even")[0].is_on
    config = TrainConfig(model_name="-", dataset_path="-", output_dir="-", batch_size=16)
    assert not Balancer(config, World(0, 2, num_local_processes=2)).is_on


def test_with_auto_any_batch_can_be_divided_but_shares_cannot_be_given():
    flags = {"model_name": "-", "dataset_path": "-", "output_dir": "-", "batch_size": 8}
    assert sorted(Balancer(TrainConfig(**flags, balance="auto"), World(0, 3)).shares) == [2, 3, 3]
    with pytest.raises(UserError, match="cannot be divided"):
        Balancer(TrainConfig(**flags), World(0, 3, num_local_processes=3))
    with pytest.raises(UserError, match="cannot be divided"):
        Balancer(TrainConfig(**flags, balance="auto"), World(0, 9))
    with pytest.raises(UserError, match="exclude each other"):
        Balancer(TrainConfig(**flags, balance="auto", shares="3:1"), World(0, 2))


def test_a_resumed_run_begins_with_the_shares_of_its_checkpoint_in_the_same_world_only():
    world = [{"host": f"host{n}", "device": "cpu"} for n in range(2)]
    for saved_world, expected in ((world, [12, 4]), (world[:1], [8, 8])):
        balancer, _ = make(16, 2)
        log = SimpleNamespace(write=lambda **row: None)
        balancer.start(balancer._session, log, {"balance": {"shares": [12, 4]}, "world": saved_world}, {})
        assert balancer.shares == expected


def test_fitting_shares_add_up_and_are_best():
    """Compared with all divisions of a small batch."""
    for seconds in ([1.0, 3.0], [1.0, 1.0, 2.5], [0.1, 5.0]):
        shares = fit_shares(seconds, 8)
        assert sum(shares) == 8 and min(shares) >= 1
        slowest = max(np.multiply(shares, seconds))
        divisions = [d for d in np.ndindex(*[9] * len(seconds)) if sum(d) == 8 and min(d) >= 1]
        assert slowest <= min(max(np.multiply(d, seconds)) for d in divisions) * (1 + 1e-9)
    assert fit_shares([1.0, 1.0, 1.0], 2) in ([1, 1, 0], [0, 1, 1], [1, 0, 1])
