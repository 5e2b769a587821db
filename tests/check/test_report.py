"""The report of a check: its JSON, which programs read, and its tables."""

import json

import pytest
from exchanges import facts_of

from forge_lib.check.arrival import Problem
from forge_lib.check.forecast import Network, Speed
from forge_lib.check.links import Link
from forge_lib.check.machine_facts import MachineSpeed
from forge_lib.check.recommend import Workload, make_forecast
from forge_lib.check.report import Report, describe
from forge_lib.cluster.cluster_file import Cluster, Machine
from forge_lib.cluster.ports import used_ports
from forge_lib.config import TrainConfig

CLUSTER = Cluster("lab", [Machine("alice", "10.77.0.1", 1, 0), Machine("bob", "10.77.0.2", 1, 1)])
SIZES = {"batch_size": 4, "micro_batch_size": 8, "sequence_length": 10}
RUN = TrainConfig(model_name="gpt2", dataset_path="-", output_dir="-", **SIZES)
STEP = ["seconds", "compute", "waiting", "sync", "tokens_per_second"]


@pytest.fixture
def report() -> Report:
    """A report with everything that a check measures."""
    workload = Workload(RUN, 8, Network(0.0, 1e9), [100], sync_every=20)
    return Report(
        cluster="lab",
        machine="bob",
        machines={"alice": facts_of("alice"), "bob": facts_of("bob", processes=2)},
        speeds={"alice": MachineSpeed({"fp32": 1e9}, 2e9), "bob": MachineSpeed({"fp32": 1e9, "bf16": 3e9}, 2e9)},
        clocks={"alice": 0.0, "bob": 0.5},
        mixed_precision="no",
        backend="gloo",
        links=[Link("alice", "bob", 125_000.0, 0.001), Link("bob", "alice", error="no answer")],
        all_reduce_seconds={1 << 16: 0.001, 1 << 20: 0.5},
        ports=used_ports(CLUSTER),
        forecast=make_forecast(workload, 2, [Speed(0.0, 1.0, 0.5, 0.5, 1e9)] * 2, [2, 2]),
    )


def test_the_keys_of_the_json_are_those_that_programs_read(report):
    content = json.loads(json.dumps(report.as_json()))
    keys = "cluster machine machines clocks problems warnings mixed_precision backend links all_reduce_seconds"
    assert list(content) == [*keys.split(), "forecast", "ports", "well"]
    assert content["ports"][1] == {
        "first": 29510,
        "last": 29510,
        "machine": "alice",
        "purpose": "lighthouse of train_elastic.py",
        "setting": "lighthouse_port in cluster.yaml",
    }
    keys = "host address interface system versions processes device cores memory_bytes free_bytes dataset flags"
    assert list(content["machines"]["bob"]) == [*keys.split(), "is_public", "flops", "copy_bandwidth"]
    assert content["links"][0] == {
        "from": "alice",
        "to": "bob",
        "bytes_per_second": 125_000.0,
        "round_trip_seconds": 0.001,
    }
    assert content["links"][1] == {"from": "bob", "to": "alice", "error": "no answer"}
    assert content["all_reduce_seconds"] == {"65536": 0.001, "1048576": 0.5}
    forecast = content["forecast"]
    assert list(forecast) == ["here", "such_machines", "sync_every", "flags", "with_flags", "notes"]
    assert list(forecast["here"]) == list(forecast["such_machines"]["2"]) == ["ddp", "ddp_fp16", "every"]
    assert list(forecast["here"]["ddp"]) == list(forecast["with_flags"]) == STEP
    assert forecast["such_machines"]["8"] is None


def test_the_json_of_a_check_that_ended_early_has_only_what_was_found():
    report = Report("lab", "bob", problems=[Problem("alice", "alice is missing", "missing")])
    assert report.as_json() == {
        "cluster": "lab",
        "machine": "bob",
        "machines": {},
        "clocks": {},
        "problems": [{"machine": "alice", "text": "alice is missing", "kind": "missing"}],
        "warnings": [],
        "ports": [],
        "well": False,
    }
    assert describe(report, CLUSTER, RUN).endswith("problem: alice is missing\nlab: 1 problem found")


def test_the_tables_mark_differences_and_show_links_and_forecast(report):
    lines = [line.split() for line in describe(report, CLUSTER, RUN).splitlines()]
    assert ["device", "1", "x", "cpu", "2", "x", "cpu", "differs"] in lines
    assert ["bf16", "products", "not", "faster", "3", "GFLOP/s"] in lines
    assert ["alice", "bob", "1.00", "ms", "1.0", "Mbit/s"] in lines
    assert ["bob", "alice", "no", "answer"] in lines
    assert ["64", "-", "-", "-"] in lines
    ports = "29511 to 29512 all machines peers of train_elastic.py peer_port in cluster.yaml"
    assert ports.split() in lines
    assert lines[-1] == ["lab:", "no", "problems", "found"]
