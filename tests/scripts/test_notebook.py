"""scripts/prototype.ipynb, executed as a person would from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from filelock import FileLock

NOTEBOOK = Path(__file__).resolve().parents[2] / "scripts" / "prototype.ipynb"


@pytest.fixture(scope="session")
def executed(shared_folder, home):
    """The notebook after it was executed, its training cell once more at the end, and its run folder elsewhere."""
    folder = shared_folder / "notebook"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            execute(folder)
    return nbformat.read(folder / "done.ipynb", as_version=4), folder / "run"


def execute(folder: Path) -> None:
    """Writes `done.ipynb` and the run folder `run` into a folder."""
    source = NOTEBOOK.read_text(encoding="utf-8")
    assert source.count("runs/notebook") == 1, "only the configuration names the run folder"
    notebook = nbformat.reads(source.replace("runs/notebook", (folder / "run").as_posix()), as_version=4)
    training = next(cell for cell in notebook.cells if "notebook_launcher(main" in cell.source)
    notebook.cells.append(nbformat.v4.new_code_cell(training.source))
    nbformat.write(notebook, folder / "source.ipynb")
    home = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "IPYTHONDIR": str(folder / "ipython")}
    result = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "source.ipynb", "--output", "done.ipynb"],
        cwd=folder,
        env=os.environ | home | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr


def read_losses(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def printed_by(cell: dict) -> str:
    return "".join(output.get("text", "") for output in cell["outputs"])


def test_two_processes_take_part_where_there_is_no_gpu(executed):
    """By default, a notebook's launcher may start only one process, without a message."""
    if torch.cuda.device_count():
        pytest.skip("this machine has a GPU: the notebook starts one process on each")
    assert {row["num_processes"] for row in read_losses(executed[1])} == {2}


def test_the_loss_falls_well_below_that_of_a_guess(executed):
    """A uniform guess among the 2,048 tokens costs ln 2048 = 7.62 nats; token frequencies alone save one nat."""
    losses = [row["loss"] for row in read_losses(executed[1])]
    assert losses[0] > losses[-1]
    assert losses[-1] < 6.7


def test_the_losses_are_shown_as_they_stand_in_metrics_jsonl(executed):
    notebook, run = executed
    shown = printed_by(next(cell for cell in notebook.cells if "read_json" in cell.source))
    for row in read_losses(run):
        assert f"{row['loss']:.6f}" in shown


def test_the_final_model_writes_the_sample(executed):
    """A failed command does not fail the notebook, so this test reads its output."""
    notebook, run = executed
    assert (run / "final" / "model.safetensors").is_file()
    sample = printed_by(next(cell for cell in notebook.cells if "generate.py" in cell.source))
    assert "The harbour" in sample
    assert "error" not in sample.lower()


def test_training_again_in_the_same_kernel_goes_on_from_the_checkpoint(executed):
    """A fork hangs after torch has computed in the notebook's own process; no cell may do that."""
    assert "resuming after step 40 of 40" in printed_by(executed[0].cells[-1])


def test_no_outputs_are_committed():
    """With outputs, every execution would change the file, and they could contain a user's paths."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert [
        c for c in notebook.cells if c.get("outputs") or c.get("execution_count") or "execution" in c.metadata
    ] == []
