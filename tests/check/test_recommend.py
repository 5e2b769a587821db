"""The flags that follow from a forecast."""

import pytest

from forge_lib.check.forecast import Network, Speed
from forge_lib.check.recommend import Workload, make_forecast
from forge_lib.config import TrainConfig

SLOW, FAST = (Speed(0.0, seconds, 0.5, 0.5, 1e9) for seconds in (2.0, 1.0))


def workload(bandwidth: float, **changes) -> Workload:
    sizes = {"batch_size": 6, "micro_batch_size": 8, "sequence_length": 10} | changes
    run = TrainConfig(model_name="-", dataset_path="-", output_dir="-", **sizes)
    return Workload(run, 8, Network(0.0, bandwidth), parameter_bytes=[100], sync_every=20)


def test_unequal_machines_get_shares_and_a_slow_network_gets_fp16_gradients():
    forecast = make_forecast(workload(bandwidth=10.0), 2, [SLOW, FAST], [3, 3])
    assert forecast.flags == "--batch-size 6 --micro-batch-size 8 --shares 1:2 --gradient-compression fp16"
    assert forecast.with_flags.tokens_per_second == pytest.approx(60 / forecast.with_flags.seconds)
    assert forecast.with_flags.seconds < forecast.here.ddp.seconds
    assert "--batch-size" in forecast.notes[0], "the network still takes much of a step"
    assert forecast.notes[1].startswith("train_elastic.py trains ")


def test_equal_machines_with_a_fast_network_need_no_more_flags():
    forecast = make_forecast(workload(bandwidth=1e9), 2, [FAST, FAST], [3, 3])
    assert forecast.flags == "--batch-size 6 --micro-batch-size 8"
    assert forecast.with_flags == forecast.here.ddp
    assert not forecast.notes
    assert forecast.such_machines[2].ddp.seconds == pytest.approx(forecast.here.ddp.seconds)
    chosen = make_forecast(workload(bandwidth=1e9, micro_batch_size=0), 2, [FAST, FAST], [3, 3])
    assert chosen.flags == "--batch-size 6", "train.py chooses"
    assert forecast.such_machines[8] is None, "six sequences are too few for eight machines"


def test_given_shares_stay_unless_others_are_faster():
    forecast = make_forecast(workload(bandwidth=1e9, shares="1:2"), 2, [SLOW, FAST], [2, 4])
    assert forecast.flags == "--batch-size 6 --micro-batch-size 8 --shares 1:2"
