"""No flag is ignored without a word."""

import pytest

from forge_lib.config import TrainConfig
from forge_lib.training.unused_flags import flags_without_effect


@pytest.mark.parametrize(
    ("flags", "has_held_out_data", "lines"),
    [
        ({}, False, []),
        ({}, True, []),
        ({"warmup_steps": 5}, False, []),
        ({"eval_every": 0}, False, []),
        ({"lora_rank": 8, "lora_alpha": 32.0}, False, []),
        ({"keep_best": True, "eval_every": 50}, True, []),
        (
            {"warmup_steps": 5, "lr_scheduler": "constant"},
            False,
            ["--warmup-steps has no effect: --lr-scheduler constant has no warm-up; use constant_with_warmup"],
        ),
        ({"warmup_steps": 50}, False, ["--warmup-steps 50: the run ends after 50 steps, before the peak"]),
        (
            {"decay_steps": 5},
            False,
            ["--decay-steps has no effect: only --lr-scheduler warmup_stable_decay has a final decay"],
        ),
        ({"lora_alpha": 32.0}, False, ["--lora-alpha has no effect: there is no adapter without --lora-rank"]),
        (
            {"sample_prompt": "x"},
            False,
            ["--sample-prompt has no effect: no sample is written without --sample-every"],
        ),
        (
            {"keep_best": True, "eval_every": 7},
            False,
            [
                "--keep-best has no effect: there is no held-out data; give --eval-fraction or --eval-dataset-path",
                "--eval-every has no effect: there is no held-out data; give --eval-fraction or --eval-dataset-path",
            ],
        ),
        (
            {"keep_best": True, "eval_every": 0},
            True,
            ["--keep-best has no effect: the model is never evaluated with --eval-every 0"],
        ),
        (
            {"keep_best": True, "eval_every": 70},
            True,
            ["--keep-best needs an evaluation at each save: make --checkpoint-every a multiple of --eval-every"],
        ),
    ],
)
def test_a_flag_without_effect_is_named_with_the_reason(flags, has_held_out_data, lines):
    config = TrainConfig(model_name="m", dataset_path="d", output_dir="o", **flags)
    assert flags_without_effect(config, has_held_out_data, num_steps=50) == lines
