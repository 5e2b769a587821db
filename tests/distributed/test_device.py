"""The choices that depend on the device."""

import pytest

from forge_lib.distributed.device import choose_micro_batch_size


@pytest.mark.parametrize(
    "device, sequence_length, precision, num_machines, expected",
    [
        ("cpu", 256, "no", 1, 4),
        ("cpu", 256, "bf16", 1, 8),
        ("cpu", 64, "no", 1, 8),
        ("cpu", 4096, "bf16", 1, 1),
        ("cpu", 256, "no", 2, 8),  # the last backward pass hides the exchange
        ("cuda", 256, "no", 1, 64),
        ("cuda", 512, "bf16", 2, 32),
        ("cuda", 100_000, "bf16", 1, 1),
        ("mps", 256, "no", 1, 8),
    ],
)
def test_a_forward_pass_fits_the_cache_of_a_cpu_and_fills_a_gpu(
    device, sequence_length, precision, num_machines, expected
):
    assert choose_micro_batch_size(device, sequence_length, precision, num_machines) == expected
