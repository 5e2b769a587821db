"""What the processes compare before they train, and the backend and precision that follow from it."""

import dataclasses
from collections.abc import Callable

import pytest

from forge_lib.config import WorldConfig
from forge_lib.distributed.agreement import agree, check_world, compare_inputs, describe_world
from forge_lib.distributed.facts import InputFacts, ProcessFacts
from forge_lib.errors import UserError
from forge_lib.process import World

ALICE = ProcessFacts(
    host="alice",
    address="10.0.0.1",
    port=29500,
    interface="eth0",
    is_public=False,
    device="cpu",
    device_name="cpu",
    threads=2,
    cores=2,
    num_local_processes=1,
    instructions="AVX2",
    flops={"fp32": 1e11},
    launcher_mixed_precision="no",
    versions={"python": "3.11.7", "torch": "2.13.0+cpu", "accelerate": "1.15.0", "transformers": "5.23.0"},
    config={"learning_rate": 1e-3, "mixed_precision": "auto"},
)
BOB = dataclasses.replace(ALICE, host="bob", address="10.0.0.2")
INPUTS = InputFacts("alice", fingerprints={"--dataset-path": "a" * 64}, weights="c" * 32, random_weights=False)
FAST_BF16 = {"fp32": 1e11, "bf16": 3e11}

replace = dataclasses.replace


def with_torch(version: str) -> ProcessFacts:
    return replace(BOB, versions=BOB.versions | {"torch": version})


def error_of(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


def test_a_difference_in_a_flag_or_a_version_names_the_machine_and_both_values():
    other_rate = replace(BOB, config=BOB.config | {"learning_rate": 2e-3})
    text = error_of(agree, [ALICE, other_rate, with_torch("2.14.0")], WorldConfig())
    assert "bob (process 1) differs from alice (process 0) in --learning-rate: 0.002 instead of 0.001" in text
    assert (
        "bob (process 2) differs from alice (process 0) in the version of torch: 2.14.0 instead of 2.13.0+cpu" in text
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fingerprints": {"--dataset-path": "b" * 64}},
            "in its --dataset-path: fingerprint bbbbbbbbbbbb instead of aaaaaaaaaaaa",
        ),
        ({"fingerprints": {}}, "in its --dataset-path: fingerprint None instead of aaaaaaaaaaaa"),
        ({"weights": "d" * 32}, "in the model's weights: hash dddddddddddd instead of cccccccccccc"),
    ],
)
def test_a_difference_in_the_inputs_names_the_machine_and_both_hashes(changes, message):
    text = error_of(compare_inputs, [INPUTS, replace(INPUTS, host="bob", **changes)])
    assert f"bob (process 1) differs from alice (process 0) {message}" in text


def test_another_patch_version_is_a_warning_and_another_build_of_the_same_version_is_nothing():
    (warning,) = agree([ALICE, with_torch("2.13.1+cu128")], WorldConfig()).warnings
    assert warning.startswith("bob (process 1) differs from alice (process 0) in the version of torch: 2.13.1+cu128")
    assert not agree([ALICE, with_torch("2.13.0")], WorldConfig()).warnings


def test_other_random_weights_are_a_warning():
    random = replace(INPUTS, random_weights=True)
    (warning,) = compare_inputs([random, replace(random, host="bob", weights="d" * 32)])
    assert warning.startswith("bob (process 1) differs from alice (process 0) in the random initial weights")


def test_bf16_is_chosen_only_if_every_process_runs_it_faster():
    fast = [replace(process, flops=FAST_BF16) for process in (ALICE, BOB)]
    assert agree([ALICE, fast[1]], WorldConfig()).mixed_precision == "no"
    assert agree(fast, WorldConfig()).mixed_precision == "bf16"


def test_the_flag_overrides_the_precision_of_the_yaml_with_a_warning():
    yaml = [replace(process, launcher_mixed_precision="bf16") for process in (ALICE, BOB)]
    assert agree(yaml, WorldConfig()).mixed_precision == "bf16"
    flag = [replace(process, config=process.config | {"mixed_precision": "no"}) for process in yaml]
    agreement = agree(flag, WorldConfig())
    assert agreement.mixed_precision == "no"
    assert "overrides mixed_precision: bf16 of the YAML" in agreement.warnings[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"launcher_mixed_precision": "fp8"},
            "mixed_precision: fp8 of the YAML is not supported; use no, bf16 or fp16",
        ),
        ({"config": {"mixed_precision": "fp16"}}, "fp16 needs a GPU for every process"),
        (
            {"config": {"mixed_precision": "fp16", "optimizer": "muon"}, "device": "cuda"},
            "--optimizer muon does not work with mixed precision fp16",
        ),
    ],
)
def test_a_precision_that_does_not_work_is_refused(changes, message):
    assert message in error_of(agree, [replace(ALICE, **changes)], WorldConfig())


def test_the_backend_is_nccl_if_every_process_has_a_gpu():
    mixed, gpus = [ALICE, replace(BOB, device="cuda")], [replace(each, device="cuda") for each in (ALICE, BOB)]
    assert agree(mixed, WorldConfig()).backend == "gloo"
    message = "--backend nccl needs a GPU for every process, but alice has none"
    assert message in error_of(agree, mixed, WorldConfig(backend="nccl"))
    assert agree(gpus, WorldConfig()).backend == "nccl"
    assert agree(gpus, WorldConfig(backend="gloo")).backend == "gloo"


def test_processes_are_alike_if_device_threads_instructions_and_torch_are_equal():
    assert agree([ALICE, BOB], WorldConfig()).alike
    for other in (replace(BOB, threads=4), replace(BOB, instructions="AVX512"), with_torch("2.13.1")):
        assert not agree([ALICE, other], WorldConfig()).alike


def test_a_public_main_address_and_idle_cores_are_each_warned_of_once():
    idle = replace(BOB, cores=8)
    public_warning, idle_warning = agree([replace(ALICE, is_public=True), idle, idle], WorldConfig()).warnings
    assert "anyone who can reach 10.0.0.1 port 29500 can join this run and read its data" in public_warning
    assert "bob computes with 2 of its 8 cores: OMP_NUM_THREADS is set" in idle_warning
    assert agree([ALICE, ALICE], WorldConfig()).warnings == []


def test_a_world_with_fewer_processes_than_announced_is_refused():
    check_world(World(), 1)
    with pytest.raises(UserError, match="announced 2 processes, but 1 started"):
        check_world(World(num_processes=2), 1)


def test_the_log_names_machines_devices_backend_and_precision():
    two = agree([ALICE, replace(ALICE), BOB], WorldConfig())
    slow = "bf16 is not clearly faster on alice"
    machines = "alice [10.0.0.1 eth0]: 2 x cpu, bob [10.0.0.2 eth0]: 1 x cpu"
    assert describe_world(two) == f"3 processes on 2 machines ({machines}), gloo, fp32 ({slow})"
    one = agree([replace(ALICE, address="", flops=FAST_BF16)], WorldConfig())
    assert describe_world(one) == "1 process on 1 machine (alice: 1 x cpu), bf16 (measured: 3.0 times as fast as fp32)"
    chosen = agree([replace(ALICE, address="", config={"mixed_precision": "no"})], WorldConfig())
    assert describe_world(chosen) == "1 process on 1 machine (alice: 1 x cpu), fp32"
