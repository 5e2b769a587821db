"""The timeout of the process group, against values computed by hand."""

from types import SimpleNamespace

import pytest
import torch

from forge_lib.distributed import timeouts
from forge_lib.distributed.timeouts import GroupTimeout


@pytest.fixture
def make_timeout(monkeypatch):
    """Returns a timeout over two processes for a model of 4,000,000 bytes and a link of that many bytes per second."""

    def make(bandwidth: float, num_processes: int = 2) -> GroupTimeout:
        monkeypatch.setattr(timeouts, "all_reduce_bandwidth", lambda *_: bandwidth)
        monkeypatch.setattr(timeouts.dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: None)
        accelerator = SimpleNamespace(num_processes=num_processes, device=torch.device("cpu"))
        return GroupTimeout(accelerator, torch.nn.Linear(1000, 1000, bias=False), floor_seconds=60)

    return make


def test_the_timeout_is_ten_minutes_until_the_first_step_and_then_the_floor(make_timeout):
    timeout = make_timeout(1e9)
    assert timeout.seconds == 600
    timeout.first_step_done()
    assert timeout.seconds == 60


def test_the_timeout_covers_twice_the_longest_pause_and_four_of_the_largest_transfers(make_timeout):
    timeout = make_timeout(1e5)  # 40 s for the model
    timeout.first_step_done()
    assert timeout.seconds == 160
    timeout.paused(100)
    timeout.paused(50)
    assert timeout.seconds == 200
    assert timeout.describe() == {
        "seconds": 200,
        "floor_seconds": 60,
        "largest_transfer_bytes": 4_000_000,
        "bytes_per_second": 1e5,
        "longest_pause_seconds": 100,
    }


def test_a_single_process_has_no_timeout(make_timeout):
    assert make_timeout(1e9, num_processes=1).seconds == 0
