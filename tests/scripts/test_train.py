"""What training promises, through the commands that a user types."""

import hashlib
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import BIN, QUIET, ROOT, SHORT, accelerate_launcher
from run_folders import losses, rows, wait_for_step
from safetensors.torch import load_file
from small_models import BART
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, GPT2Config, RwkvConfig, pipeline

from forge_lib.checkpoints import format as checkpoint
from forge_lib.config import TrainConfig
from forge_lib.data import batches, blocks, corpus
from forge_lib.flags import parse_config
from scripts import generate

FLAGS = [*SHORT, *QUIET]


def assert_same_trajectory(found: list[float], reference: list[float]) -> None:
    """Checks that losses are equal to 1e-5 and differ both ways: rounding, no drift."""
    relative = (np.array(found) - reference) / reference
    assert len(found) == len(reference) == 50
    assert np.abs(relative).max() < 1e-5, relative
    assert abs(relative.mean()) < 5e-7, relative


def sha256(folder) -> str:
    return hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()


def test_accumulation_keeps_the_trajectory(train, trained):
    folder, ended = train(*FLAGS, "--micro-batch-size", "2")
    assert ended.code == 0, ended.output
    assert "4 micro-batch" in ended.output
    assert_same_trajectory(losses(folder), losses(trained))


@pytest.mark.parametrize("shares", ["", "3:1"])
def test_two_processes_keep_the_trajectory(train, trained, two_processes, shares):
    folder, ended = train(*FLAGS, "--shares", shares, launcher=two_processes)
    assert ended.code == 0, ended.output
    assert rows(folder)[-1]["num_processes"] == 2
    assert_same_trajectory(losses(folder), losses(trained))


@pytest.mark.netns
@pytest.mark.parametrize("per_host", [(1, 1), (2, 1)])
def test_two_hosts_keep_the_trajectory(start, trained, hosts, tmp_path, per_host):
    """Each host has its own YAML, home and run folder; batch 8 over 2 + 1 processes in parts 2:1:1."""
    machines = hosts(2)
    running = []
    for rank, count in enumerate(per_host):
        launcher = accelerate_launcher(
            tmp_path, 29500, num_machines=2, machine_rank=rank, num_processes=2 * count, main_process_ip="10.77.0.1"
        )
        shares = ["--shares", "2:1:1"] if sum(per_host) == 3 else []
        words = [*launcher, "scripts/train.py", *FLAGS, *shares, "--output-dir", tmp_path / f"host{rank}"]
        running.append(start(words, prefix=[*machines.on(rank + 1), "env", "OMP_NUM_THREADS=1"]))
    ended = [each.finish(180) for each in running]
    assert [each.code for each in ended] == [0, 0], ended[0].output + ended[1].output
    assert "on 2 machines" in ended[0].output
    assert rows(tmp_path / "host0")[-1]["num_processes"] == sum(per_host)
    assert_same_trajectory(losses(tmp_path / "host0"), losses(trained))


@pytest.mark.parametrize(("optimizer", "count"), [("adamw", 2), ("adafactor", 1)])
def test_a_stopped_run_goes_on_bit_for_bit(train, start, tmp_path, two_processes, optimizer, count):
    """One run of 50 steps; another that is killed after the checkpoint of step 25 and started again."""
    launcher = two_processes if count == 2 else (sys.executable,)
    flags = [*FLAGS, "--checkpoint-every", "25", "--optimizer", optimizer, "--dropout", "0.1"]
    reference, ended = train(*flags, launcher=launcher, folder="whole")
    assert ended.code == 0, ended.output
    folder = tmp_path / "parts"
    stopped = start([*launcher, "scripts/train.py", *flags, "--output-dir", folder], warm=True)
    while not (folder / "checkpoints" / "step-00000025").exists():
        assert stopped.process.poll() is None, stopped.log.read_text()
        time.sleep(0.05)
    stopped.kill()
    assert not (folder / "final").exists()
    _, ended = train(*flags, launcher=launcher, folder="parts")
    assert ended.code == 0, ended.output
    assert "resuming after step 25 of 50" in ended.output
    assert sha256(folder) == sha256(reference)
    assert losses(folder)[-25:] == losses(reference)[-25:]


def test_weights_do_not_change_under_a_checkpoint_that_is_being_copied(train, run, tmp_path):
    flags = [*FLAGS, "--max-steps", "4", "--checkpoint-every", "2"]
    foreground, ended = train(*flags, "--no-checkpoint-async")
    assert ended.code == 0, ended.output
    faults = json.dumps([{"do": "sleep", "at": "copying", "seconds": 1}])
    words = [sys.executable, "tests/faults/faulty.py", *flags, "--output-dir", tmp_path / "slow"]
    ended = run(words, warm=True, variables={"FAULTS": faults})
    assert ended.code == 0, ended.output
    for file in checkpoint.TENSOR_FILES:
        for step in ("step-00000002", "step-00000004"):
            path = Path("checkpoints", step, file)
            assert (tmp_path / "slow" / path).read_bytes() == (foreground / path).read_bytes()


@pytest.mark.parametrize("how", ["file", "ctrl-c"])
def test_one_process_that_is_told_to_stop_saves_and_goes_on(train, start, tmp_path, how):
    flags = [*FLAGS, "--max-steps", "100000"]
    running = start([sys.executable, "scripts/train.py", *flags, "--output-dir", tmp_path / "run"], warm=True)
    wait_for_step(tmp_path / "run", 3)
    if how == "file":
        (tmp_path / "run" / "stop").touch()
    else:
        running.process.send_signal(signal.SIGINT)
    ended = running.finish()
    assert ended.code == 0, ended.output
    assert "stopped after step" in ended.output
    assert not (tmp_path / "run" / "stop").exists()
    step = rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").exists()
    folder, ended = train(*flags, "--max-steps", str(step + 1))
    assert ended.code == 0, ended.output
    assert f"resuming after step {step} of {step + 1}" in ended.output
    assert (folder / "final").exists()


def test_a_longer_run_goes_on_and_a_changed_one_is_refused(train, trained):
    folder, _ = train(*FLAGS, "--max-steps", "2", "--checkpoint-every", "1")
    _, ended = train(*FLAGS, "--max-steps", "4", "--checkpoint-every", "1", "--learning-rate", "1e-4")
    assert ended.code == 0, ended.output
    assert rows(folder)[-1]["step"] == 4
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    _, ended = train(*FLAGS, "--max-steps", "6", "--sequence-length", "32")
    assert (ended.code, "sequence_length was 64 and is now 32" in ended.output) == (2, True), ended.output
    _, ended = train(*FLAGS, "--resume", "never")
    assert (ended.code, "--resume never" in ended.output) == (2, True), ended.output


def test_the_first_loss_is_that_of_guessing(trained):
    assert abs(losses(trained)[0] / math.log(2048) - 1) < 0.05


def test_the_loss_of_a_batch_is_the_one_that_transformers_gives(train, trained):
    """Step 1 of a run that starts from trained weights, against `model(input_ids, labels=...)` on the same blocks."""
    flags = [*FLAGS, "--model-name", str(trained / "final"), "--max-steps", "1"]
    folder, ended = train(*flags, "--micro-batch-size", "3")
    assert ended.code == 0, ended.output
    config = parse_config(TrainConfig, [*flags, "--output-dir", "unused"])
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    store = corpus.prepare_store(config, tokenizer)
    dataset = blocks.BlockDataset(blocks.TokenStream(store.tokens, store.documents), 64)
    plan = batches.BatchPlan.of_run(len(dataset), 8, 1, 1.0, config.seed)
    ids = torch.stack([dataset[int(i)]["input_ids"] for i in plan.batch(0)])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(trained / "final")(ids, labels=ids).loss.item()
    assert losses(folder)[0] == pytest.approx(expected, rel=1e-5)


def test_lora_trains_adapters_alone_and_merges_them(train, trained, two_processes):
    flags = [*FLAGS, "--model-name", str(trained / "final"), "--lora-rank", "4", "--max-steps", "20"]
    folder, ended = train(*flags, "--learning-rate", "1e-2", "--checkpoint-every", "10", launcher=two_processes)
    assert ended.code == 0, ended.output
    saved = load_file(folder / "checkpoints" / "step-00000020" / "model.safetensors")
    assert all("lora_" in name for name in saved)
    assert rows(folder)[-1]["bytes_sent"] == sum(t.numel() for t in saved.values()) * 4, "only adapters are sent"

    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(trained / "final")
    merged = AutoModelForCausalLM.from_pretrained(folder / "final")
    ids = torch.tensor([[1000, 1001, 1002, 7, 300]])
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder / "final" / "adapter").eval()
    untouched = load_file(trained / "final" / "model.safetensors")
    under_adapter = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in adapted.state_dict().items()
    }
    assert all(torch.equal(under_adapter[name], tensor) for name, tensor in untouched.items())
    assert not torch.allclose(adapted(ids).logits, before, atol=1e-2), "the adapters have learned something"
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(adapted.generate(input_ids=ids, **options), merged.generate(input_ids=ids, **options))


def test_the_final_folder_works_in_transformers(trained):
    writer = pipeline("text-generation", model=str(trained / "final"))
    assert len(writer("The", max_new_tokens=5)[0]["generated_text"]) > 3
    assert "Model card" in (trained / "final" / "README.md").read_text()
    assert (trained / "final" / "generation_config.json").exists()


def test_metrics_and_run_json_hold_what_is_promised(trained):
    timing = "tokens_per_second step_seconds data_seconds compute_seconds sync_seconds bytes_sent mfu"
    world = "num_processes shares sequences_per_second time"
    promised = f"step epoch tokens loss grad_norm learning_rate {timing} peak_memory_bytes {world}".split(" ")
    for row in rows(trained):
        assert list(row) == promised
        assert row["tokens"] == row["step"] * 8 * 64
        parts = row["data_seconds"] + row["compute_seconds"] + row["sync_seconds"]
        assert parts == pytest.approx(row["step_seconds"])
    run = json.loads((trained / "run.json").read_text())
    assert run["config"]["batch_size"] == 8
    assert run["world"][0]["versions"]["torch"] == torch.__version__


def test_evaluation_counts_each_token_once_however_it_is_divided(train, run, trained, two_processes, tmp_path):
    """The held-out loss of train.py over 2 processes, of evaluate.py over 2 and over 1, and of a plain loop."""
    held_out = ["--eval-fraction", "0.02", "--eval-every", "1"]
    folder, ended = train(
        *FLAGS, "--model-name", str(trained / "final"), "--max-steps", "1", *held_out, launcher=two_processes
    )
    assert ended.code == 0, ended.output
    in_training = rows(folder, "eval_loss")[-1]
    data = ["--dataset-path", "data/sample_corpus.txt", "--sample-by", "paragraph", "--sequence-length", "64"]
    measured = []
    for launcher in (two_processes, (sys.executable,)):
        words = [*launcher, "scripts/evaluate.py", "--model-name", folder / "final", *data, "--eval-fraction", "0.02"]
        ended = run(words, warm=True)
        assert ended.code == 0, ended.output
        measured.append(json.loads(ended.output[ended.output.index("{\n") :]))
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], rel=1e-6)
    assert measured[1]["loss"] == pytest.approx(in_training["eval_loss"], rel=1e-6)
    assert measured[0]["eval_tokens"] == measured[1]["eval_tokens"] == in_training["eval_tokens"]
    assert measured[1]["perplexity"] == pytest.approx(math.exp(measured[1]["loss"]))


def test_a_loss_that_is_not_finite_stops_every_process_before_it_touches_a_weight(
    train, trained, tmp_path, two_processes
):
    """The embedding of position 20 is infinite: the message names step 1, both processes and the samples."""
    broken = tmp_path / "broken"
    shutil.copytree(trained / "final", broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.transformer.wpe.weight.data[20] = float("inf")
    model.save_pretrained(broken)
    folder, ended = train(*FLAGS, "--model-name", str(broken), launcher=two_processes, timeout=60)
    assert ended.code != 0
    assert "step 1: not finite: process 0, samples [" in ended.output
    assert "process 1, samples [" in ended.output
    assert not (folder / "final").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed-precision", "bf16", "--gradient-checkpointing", "--mask-documents", "--report-to", "tensorboard"],
        ["--optimizer", "muon", "--lr-scheduler", "warmup_stable_decay", "--warmup-steps", "1", "--dropout", "0.1"],
    ],
    ids=lambda flags: flags[0],
)
def test_each_way_to_train_lowers_the_loss(train, two_processes, flags):
    folder, ended = train(*FLAGS, "--max-steps", "8", "--sequence-length", "32", *flags, launcher=two_processes)
    assert ended.code == 0, ended.output
    assert losses(folder)[-1] < losses(folder)[0] - 0.1
    if "tensorboard" in flags:
        assert list(folder.rglob("events.out.tfevents.*"))


def test_a_compiled_model_keeps_the_trajectory_and_its_names(train, tmp_path):
    """A model of one layer, since compiling takes most of the time."""
    AutoTokenizer.from_pretrained("data/tiny_gpt2").save_pretrained(tmp_path / "small")
    GPT2Config(vocab_size=2048, n_positions=64, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "small")
    flags = [*FLAGS, "--model-name", str(tmp_path / "small"), "--max-steps", "3"]
    plain, ended = train(*flags, folder="plain")
    assert ended.code == 0, ended.output
    compiled, ended = train(*flags, "--compile", folder="compiled")
    assert ended.code == 0, ended.output
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    names = [load_file(folder / "final" / "model.safetensors").keys() for folder in (plain, compiled)]
    assert names[0] == names[1]


def test_a_background_save_is_reported_long_before_the_next_one(start, tmp_path):
    """Step 100 is saved, and step 120 sleeps: the row is there, although the next save is far away."""
    words = [sys.executable, "scripts/train.py", *FLAGS, "--max-steps", "150", "--checkpoint-every", "100"]
    faults = json.dumps([{"do": "sleep", "at": "computing", "step": 120, "seconds": 20}])
    words[1] = "tests/faults/faulty.py"
    running = start([*words, "--output-dir", tmp_path / "run"], warm=True, variables={"FAULTS": faults})
    wait_for_step(tmp_path / "run", 119)
    assert [row["step"] for row in rows(tmp_path / "run", "event") if row["event"] == "checkpoint"] == [100]
    running.kill()


def test_samples_and_checkpoints_are_events_of_the_log(train):
    folder, ended = train(
        *FLAGS, "--max-steps", "2", "--sample-every", "1", "--checkpoint-every", "2", "--sample-prompt", "The"
    )
    assert ended.code == 0, ended.output
    events = [(row["event"], row["step"]) for row in rows(folder, "event")]
    assert events == [("start", 0), ("sample", 1), ("sample", 2), ("checkpoint", 2)]
    assert rows(folder, "text")[0]["text"].startswith("The")


def test_plain_torchrun_trains_too(train, trained, free_port):
    launcher = (BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port))
    folder, ended = train(*FLAGS, "--max-steps", "3", launcher=launcher)
    assert ended.code == 0, ended.output
    assert losses(folder)[0] == pytest.approx(losses(trained)[0], rel=1e-6)


def test_generate_streams_the_same_text_for_the_same_seed(run, trained, capsys):
    config = [f"--model-name={trained / 'final'}", "--prompt", "The", "--max-new-tokens", "12"]
    texts = [generate.main(parse_config(generate.GenerateConfig, [*config, "--seed", seed])) for seed in "112"]
    assert texts[0] == texts[1] != texts[2]
    assert capsys.readouterr().out == "".join(text + "\n" for text in texts)
    ended = run([sys.executable, "scripts/generate.py", *config, "--seed", "1"], warm=True)
    assert (ended.code, ended.output.strip()) == (0, texts[0].strip())


def test_gradients_in_fp16_travel_in_half_the_bytes_to_nearly_the_same_losses(train, two_processes, trained):
    """Also over two micro-batches; rounding to 11 bits changes the last digits of the losses."""
    flags = [*FLAGS, "--gradient-compression", "fp16", "--micro-batch-size", 2]
    folder, ended = train(*flags, launcher=two_processes)
    assert ended.code == 0, ended.output
    num_parameters = sum(t.numel() for t in load_file(folder / "final" / "model.safetensors").values())
    assert rows(folder)[-1]["bytes_sent"] == 2 * num_parameters
    found, expected = np.array(losses(folder)), np.array(losses(trained))
    assert 1e-7 < np.abs(found / expected - 1).max() < 2e-3


def test_evaluations_and_samples_do_not_change_what_is_trained(train, tmp_path):
    """RWKV changes its weights in evaluation mode. Its final model equals that of a run without evaluations."""
    folder = tmp_path / "rwkv"
    AutoTokenizer.from_pretrained("data/tiny_gpt2").save_pretrained(folder)
    RwkvConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=4, rescale_every=2).save_pretrained(folder)
    flags = [*FLAGS, "--model-name", str(folder), "--max-steps", "4", "--eval-fraction", "0.01"]
    plain, ended = train(*flags, folder="plain")
    assert ended.code == 0, ended.output
    assert "random weights: the model folder has none" in ended.output
    watched, ended = train(
        *flags, "--eval-every", "1", "--sample-every", "2", "--checkpoint-every", "2", folder="watched"
    )
    assert ended.code == 0, ended.output
    assert sha256(watched) == sha256(plain)
    assert losses(watched) == losses(plain)
    loaded = load_file(watched / "checkpoints" / "step-00000004" / "model.safetensors")
    final = load_file(watched / "final" / "model.safetensors")
    assert all(torch.equal(final[name], loaded[name]) for name in final)


def test_parameters_that_text_does_not_need_stay_as_they_are(train, two_processes, tmp_path):
    """DDP waits for the gradient of each parameter that it knows."""
    folder = tmp_path / "bart"
    BartConfig(**BART.to_dict() | {"vocab_size": 2048}).save_pretrained(folder)
    for file in (ROOT / "data" / "tiny_gpt2").glob("tokenizer*"):
        shutil.copy(file, folder)
    flags = [*FLAGS, "--model-name", folder, "--max-steps", "3"]
    one, ended = train(*flags, folder="one")
    assert ended.code == 0, ended.output
    two, ended = train(*flags, launcher=two_processes, folder="two")
    assert ended.code == 0, ended.output
    assert "parameter(s) are not needed for text, and stay as they are: model.decoder.layers.0.enc" in ended.output
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    weights = [load_file(each / "final" / "model.safetensors") for each in (one, two)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_a_run_may_be_continued_with_gradient_checkpointing_and_more_epochs(train, tmp_path):
    """In its log: the flags that changed, and the samples that the short last batch leaves out."""
    (tmp_path / "text.txt").write_text("The harbour is quiet in the morning, and a boat comes in. " * 40)
    flags = [*FLAGS, "--dataset-path", tmp_path / "text.txt", "--sample-by", "document", "--batch-size", "4"]
    flags += ["--max-steps", "0", "--sequence-length", "32", "--checkpoint-every", "100"]
    _, ended = train(*flags, "--epochs", "1")
    assert ended.code == 0, ended.output
    folder, ended = train(*flags, "--epochs", "2", "--gradient-checkpointing")
    assert ended.code == 0, ended.output
    state = json.loads(next((folder / "checkpoints").glob("step-*/state.json")).read_text())["sampler"]
    assert state["num_blocks"] % 4, "the last batch of the first run is short"
    assert "--gradient-checkpointing was False and is now True" in ended.output
    missing = 4 - state["num_blocks"] % 4
    assert (
        f"{missing} sequence(s) are left out, because the last batch of the shorter run was not full" in ended.output
    )
