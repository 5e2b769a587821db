"""Flags and YAML keys."""

import dataclasses

import pytest

from forge_lib.config import TrainConfig
from forge_lib.errors import UserError
from forge_lib.flags import parse_config

NEEDED = ["--model-name", "m", "--dataset-path", "d", "--output-dir", "o"]


def test_a_flag_is_the_same_with_dashes_and_with_underscores():
    dashes = parse_config(TrainConfig, [*NEEDED, "--micro-batch-size", "3"])
    underscores = parse_config(TrainConfig, ["--model_name=m", *NEEDED[2:], "--micro_batch_size", "3"])
    assert dashes == underscores
    assert dashes.micro_batch_size == 3


def test_yaml_gives_defaults_and_flags_override_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning-rate: 1e-4\nmodel_name: a\ndataset_path: d\noutput_dir: o\nfrom_scratch: true\nseed: 7\n"
    )
    config = parse_config(TrainConfig, ["--config", str(path), "--seed", "8"])
    assert (config.learning_rate, config.model_name, config.from_scratch, config.seed) == (1e-4, "a", True, 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*NEEDED, "--batchsize", "3"], "unknown flag --batchsize; did you mean --batch-size?"),
        ([*NEEDED, "--batch-size", "three"], "--batch-size: invalid int value: 'three'"),
        ([*NEEDED, "--optimizer", "adamv"], "--optimizer: invalid choice: 'adamv'"),
        ([*NEEDED, "stray"], "unexpected argument 'stray'"),
        (NEEDED[2:], "required: --model-name"),
        ([*NEEDED, "--master-addr", "10.0.0.1"], "--master-addr is a flag of p2p-llm-forge"),
        ([*NEEDED, "--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)
def test_a_mistake_in_the_flags_is_named(argv, message):
    with pytest.raises(UserError) as error:
        parse_config(TrainConfig, argv)
    assert message in str(error.value)


def test_an_unknown_key_of_the_yaml_is_named_with_its_nearest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rat: 1\n")
    with pytest.raises(UserError, match=r"unknown key 'learning_rat'; did you mean --learning-rate\?"):
        parse_config(TrainConfig, [*NEEDED, "--config", str(path)])


def test_all_values_out_of_range_are_named_at_once():
    with pytest.raises(UserError) as error:
        TrainConfig(
            model_name="m", dataset_path="d", output_dir="o", batch_size=0, learning_rate=-1.0, eval_fraction=1.5
        )
    for flag in ("--batch-size", "--learning-rate", "--eval-fraction"):
        assert flag in str(error.value)


def test_help_shows_every_flag_on_one_line_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(TrainConfig, ["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        (line,) = [line for line in lines if line.split()[:1] == [flag]]
        assert len(line) <= 119
        assert len(line.split()) > 2, f"{flag} has no help on its line"
        if type(field.default) in (int, float) and field.default is not dataclasses.MISSING:
            assert f"[{field.default}]" in line


def test_values_of_the_yaml_mean_what_they_mean_on_the_command_line(tmp_path):
    """YAML itself reads `no` as False, 3:1 as 181, 010 as 8 and 1e-4 as a text."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "gradient_compression: no\nmixed_precision: no\nshares: 3:1\nbatch_size: 010\nlearning_rate: 1e-4\n"
        "compile: on\nwrite_report: no\nsample_prompt: 2024-01-01\nseed:\ndocument_separator: ''\n"
    )
    config = parse_config(TrainConfig, [*NEEDED, "--config", str(path)])
    assert (config.gradient_compression, config.mixed_precision, config.shares) == ("no", "no", "3:1")
    assert (config.batch_size, config.learning_rate, config.sample_prompt) == (10, 1e-4, "2024-01-01")
    assert (config.compile, config.write_report, config.seed, config.document_separator) == (True, False, 0, "")


def test_a_value_that_looks_like_a_flag_is_explained():
    with pytest.raises(UserError, match=r"value of --document-separator: --document-separator=---$"):
        parse_config(TrainConfig, [*NEEDED, "--document-separator", "---"])
    assert parse_config(TrainConfig, [*NEEDED, "--document-separator=---"]).document_separator == "---"


def test_an_empty_yaml_and_merged_mappings_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\n")
    assert parse_config(TrainConfig, [*NEEDED, "--config", str(path)]).seed == 0
    path.write_text("<<: {seed: 7}\nbatch_size: 16\n")
    config = parse_config(TrainConfig, [*NEEDED, "--config", str(path)])
    assert (config.seed, config.batch_size) == (7, 16)
