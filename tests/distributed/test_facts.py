"""What a process sends the others about itself."""

import dataclasses
import json

import accelerate
import pytest
import torch
import transformers

from forge_lib.config import WorldConfig
from forge_lib.distributed import facts
from forge_lib.distributed.facts import ProcessFacts, differing_versions, local_facts, measure_flops, versions
from forge_lib.process import World


def test_the_facts_survive_json_and_keep_the_field_names_of_run_json():
    found = local_facts(WorldConfig(), World(), "cpu")
    fields = json.loads(json.dumps(dataclasses.asdict(found)))
    assert ProcessFacts(**fields) == found
    assert list(fields) == [
        *("host", "address", "port", "interface", "is_public", "device", "device_name", "threads", "cores"),
        *("num_local_processes", "instructions", "flops", "launcher_mixed_precision", "versions", "config"),
        *("machine", "run_id", "has"),
    ]


def test_the_versions_are_those_that_the_libraries_report():
    assert {name: versions()[name] for name in ("torch", "accelerate", "transformers")} == {
        module.__name__: module.__version__ for module in (torch, accelerate, transformers)
    }


def test_a_run_works_with_libraries_that_differ_only_after_the_minor_version():
    ours = {"torch": "2.13.0+cpu", "accelerate": "1.15.0", "transformers": "5.23.0"}
    theirs = {"torch": "2.13.0+cu128", "accelerate": "1.15.2", "transformers": "5.24.0"}
    assert differing_versions(ours, theirs) == {"accelerate": True, "transformers": False}


@pytest.mark.parametrize(
    ("small", "large", "has_bf16"),
    [(1e9, 0.0, False), (1e11, 1.1e11, False), (1e11, 1.3e11, True)],
)
def test_bf16_counts_only_if_a_large_product_is_clearly_faster(monkeypatch, small, large, has_bf16):
    """fp32 reaches 1e11 FLOP/s here. If a small bf16 product is a hundred times slower, no large one is tried."""
    speeds = {(torch.bfloat16, 256): small, (torch.bfloat16, 1024): large}
    monkeypatch.setattr(facts, "matmul_flops", lambda device, dtype, size: speeds.pop((dtype, size), 1e11))
    assert measure_flops("cpu") == {"fp32": 1e11, **({"bf16": large} if has_bf16 else {})}
    assert len(speeds) == (0 if large else 1)
