"""Mistakes of the user: one clear message and exit code 2 on every process, and no final model."""

import gzip
import sys

import pytest
from commands import BIN, QUIET, ROOT, SHORT, accelerate_launcher
from transformers import BertConfig, GPT2Config, T5Config

from forge_lib.config import TrainConfig
from forge_lib.distributed.reporting import report_errors
from forge_lib.flags import parse_config
from scripts import train as train_script


@pytest.fixture
def script(capsys, monkeypatch, tmp_path):
    """Runs scripts/train.py in this process; returns its exit code and its stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("forge_lib.distributed.device.keep_freed_memory", lambda: None)  # it would outlast the test

    def script(*flags) -> tuple[int, str]:
        argv = [*SHORT, *QUIET, "--output-dir", str(tmp_path / "run"), *map(str, flags)]
        with pytest.raises(SystemExit) as ended, report_errors("train.py"):
            train_script.main(parse_config(TrainConfig, argv))
        return ended.value.code, capsys.readouterr().err

    return script


def no_file(folder):
    return ["--dataset-path", folder / "nowhere"], "no such file or folder"


def empty_corpus(folder):
    (folder / "empty.txt").write_text("")
    return ["--dataset-path", folder / "empty.txt"], "empty: 1 file(s) of 0 bytes; expected text"


def binary_file(folder):
    (folder / "model.txt").write_bytes(b"PK\3\4\0\0")
    return ["--dataset-path", folder / "model.txt"], "not a text file: a zero byte at offset 4"


def wrong_column(folder):
    (folder / "x.jsonl").write_text('{"body": "text"}\n')
    return ["--dataset-path", folder / "x.jsonl"], "it has 'body': name one of them with --text-column"


def little_text(folder):
    (folder / "x.txt").write_text("few words")
    return ["--dataset-path", folder / "x.txt"], "too few for one block of --sequence-length 64"


def unknown_flag(folder):
    return ["--batchsize", "8"], "unknown flag --batchsize; did you mean --batch-size?"


def unknown_model(folder):
    return [
        "--model-name",
        "no/such-model",
    ], "--model-name no/such-model: neither a local model folder nor a model on the Hub"


def long_sequence(folder):
    return ["--sequence-length", "1024"], "longer than the model's 512 positions; use --sequence-length 512 or less"


def indivisible_batch(folder):
    return ["--batch-size", "8", "--shares", "3"], "--batch-size 8 cannot be divided among 1 processes in shares of 3"


def one_document(folder):
    return ["--sample-by", "document", "--eval-fraction", "0.1"], "split the text with --sample-by paragraph"


def long_prompt(folder):
    return ["--sample-every", "5", "--sample-prompt", "boat " * 600], "512 positions leave no room for more"


def no_data(folder):
    return ["--dataset-path", ""], "--dataset-path is empty; expected a file"


def no_output(folder):
    return ["--output-dir", ""], "--output-dir is empty; expected a folder"


def folder_that_is_a_file(folder):
    (folder / "taken").write_text("")
    return ["--output-dir", folder / "taken"], "is not writable"


def vocabulary_too_small(folder):
    save_with_tokenizer(folder, GPT2Config(vocab_size=100, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    return ["--model-name", folder], "knows 2048 tokens, but the model's vocabulary has 100"


def save_with_tokenizer(folder, config):
    """Writes a model folder without weights, with the bundled tokenizer."""
    for file in (ROOT / "data" / "tiny_gpt2").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config.save_pretrained(folder)


def encoder(folder):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    save_with_tokenizer(folder, BertConfig(**sizes))
    return ["--model-name", folder], "the model (type bert) predicts tokens from later ones"


def encoder_and_decoder(folder):
    save_with_tokenizer(folder, T5Config(d_model=8, num_layers=1, d_ff=8, num_heads=1))
    return [
        "--model-name",
        folder,
    ], "transformers has no causal language model of type t5; expected one such as gpt2 or llama"


def weights_of_another_program(folder):
    save_with_tokenizer(folder, GPT2Config(vocab_size=2048, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    (folder / "tf_model.h5").write_bytes(b"weights")
    return [
        "--model-name",
        folder,
    ], "found tf_model.h5, which cannot be loaded from this folder; expected model.safetensors"


def large_seed(folder):
    return ["--seed", 1 << 64], "--seed is 18446744073709551616, but must be below 18446744073709551616"


def cut_file(folder):
    data = gzip.compress(b'{"text": "one"}\n' * 1000)
    (folder / "x.jsonl.gz").write_bytes(data[:-9])
    return ["--dataset-path", folder], "x.jsonl.gz: the end of the compressed file is missing"


def number_as_text(folder):
    (folder / "x.jsonl").write_text('{"text": 7}\n')
    return ["--dataset-path", folder], "x.jsonl: line 1: column 'text' has the number 7 without quotes, expected text"


def shifted_csv(folder):
    (folder / "x.csv").write_text("id,text\n1,Hello, world\n")
    return ["--dataset-path", folder], "x.csv: line 2 has 3 fields, but the header has 2"


@pytest.mark.parametrize(
    "mistake",
    [
        no_file,
        empty_corpus,
        binary_file,
        wrong_column,
        little_text,
        unknown_flag,
        unknown_model,
        long_sequence,
        indivisible_batch,
        one_document,
        long_prompt,
        no_data,
        no_output,
        folder_that_is_a_file,
        vocabulary_too_small,
        encoder,
        encoder_and_decoder,
        weights_of_another_program,
        large_seed,
        cut_file,
        number_as_text,
        shifted_csv,
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(script, tmp_path, mistake):
    flags, message = mistake(tmp_path)
    code, output = script(*flags)
    assert code == 2
    assert message in output
    assert output.count("train.py: error: ") == 1
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, "are set, but MASTER_ADDR is not: unset them"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 would change"),
    ],
)
def test_a_leftover_environment_variable_is_named(script, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, output = script("--max-steps", 1)
    assert (code, output.count("train.py: error: "), message in output) == (2, 1, True), output


def two_machines(start, tmp_path, port, first: list, second: list) -> list:
    """Runs p2p-llm-forge for two machines, each with its own flags; returns how they ended."""
    running = []
    for rank, flags in enumerate((first, second)):
        words = [BIN / "p2p-llm-forge", "--num-nodes", 2, "--node-rank", rank, "--master-addr", "127.0.0.1"]
        words += ["--master-port", port, *SHORT, *QUIET, "--output-dir", tmp_path / str(rank), *flags]
        running.append(start(words))
    return [each.finish(60) for each in running]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rate", "2e-3"], "in --learning-rate: 0.002 instead of 0.001"),
        (["--dataset-path", "{folder}/other.txt"], "in its --dataset-path: fingerprint"),
    ],
    ids=["flags", "data"],
)
def test_different_data_or_flags_on_a_second_machine_are_named_on_both(start, tmp_path, free_port, flags, message):
    text = (ROOT / "data" / "sample_corpus.txt").read_bytes()
    (tmp_path / "other.txt").write_bytes(text[:-3] + b"x" + text[-2:])
    flags = [flag.format(folder=tmp_path) for flag in flags]
    for ended in two_machines(start, tmp_path, free_port, [], flags):
        assert ended.code == 2, ended.output
        assert ended.seconds < 30
        assert ended.output.count("error: ") == 1
        assert "(process 1) differs from" in ended.output
        assert message in ended.output


def test_every_process_of_a_machine_reports_the_mistake(run, tmp_path, free_port):
    launcher = accelerate_launcher(tmp_path, free_port, num_processes=2)
    words = [*launcher, "scripts/train.py", *SHORT, *QUIET, "--output-dir", tmp_path / "run", "--batch-size", "7"]
    ended = run(words)
    assert ended.seconds < 30
    assert "exitcode  : 2" in ended.output
    assert ended.output.count("--batch-size 7 cannot be divided among 2 processes") == 2
    assert "SIGTERM before" not in ended.output  # the launcher's signal to the process that ends last


def test_a_mistyped_flag_without_a_launcher_prints_one_line(run):
    ended = run([sys.executable, "scripts/train.py", "--batchsize", "3"])
    message = "train.py: error: unknown flag --batchsize; did you mean --batch-size?; --help lists all flags\n"
    assert (ended.code, ended.output) == (2, message)


def test_help_lists_the_flags_with_exit_code_0(run):
    ended = run([sys.executable, "scripts/train.py", "--help"])
    assert (ended.code, "--batch-size SEQUENCES" in ended.output) == (0, True)
