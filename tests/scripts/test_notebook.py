"""scripts/prototype.ipynb, executed as a person would from the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from filelock import FileLock

pytestmark = pytest.mark.xdist_group("notebook")  # no second worker waits for the first one
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
    notebook = nbformat.reads(source.replace("runs/tour", (folder / "run").as_posix()), as_version=4)
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


def printed_by(notebook: dict, words: str) -> str:
    """Returns what the cell printed whose code contains `words`."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source)
    return "".join(output.get("text", "") for output in cell["outputs"])


def test_two_processes_take_part_where_there_is_no_gpu(executed):
    """By default, a notebook's launcher may start only one process, without a message."""
    if torch.cuda.device_count():
        pytest.skip("this machine has a GPU: the notebook starts one process on each")
    assert {row["num_processes"] for name in "ab" for row in read_losses(executed[1] / name)} == {2}


def test_the_loss_falls_well_below_that_of_a_guess(executed):
    """A uniform guess among the 2,048 tokens costs ln 2048 = 7.62 nats; token frequencies alone save one nat."""
    losses = [row["loss"] for row in read_losses(executed[1] / "a")]
    assert losses[0] > losses[-1]
    assert losses[-1] < 6.7


def test_the_losses_are_shown_as_they_stand_in_metrics_jsonl(executed):
    notebook, run = executed
    shown = printed_by(notebook, "read_history(Path")
    rows = [row for row in read_losses(run / "a") if row["step"] <= 40]
    assert len(rows) == 8 and all(f"{row['loss']:.6f}" in shown for row in rows)


def test_the_documents_of_the_text_are_shown(executed):
    paragraph = (NOTEBOOK.parents[1] / "data" / "sample_corpus.txt").read_text().split("\n\n")[0]
    assert paragraph[:40] in printed_by(executed[0], "np.memmap")


def test_the_final_model_writes_the_sample(executed):
    """A failed command does not fail the notebook, so this test reads its output."""
    notebook, run = executed
    assert (run / "a" / "final" / "model.safetensors").is_file()
    sample = printed_by(notebook, "generate.py")
    assert "The harbour" in sample
    assert "error" not in sample.lower()


def test_training_again_in_the_same_kernel_goes_on_from_the_checkpoint(executed):
    """A fork hangs after torch has computed in the notebook's own process; no cell may do that."""
    assert "resuming after step 40 of 80" in printed_by(executed[0], "train(replace(config, max_steps=80))")


def test_both_runs_are_compared(executed):
    shown = printed_by(executed[0], "histories = [")
    assert "a: learning rate 0.004, held-out loss " in shown and "b: learning rate 0.001, held-out loss " in shown


def test_it_is_committed_with_its_outputs_and_without_paths_of_a_machine():
    """So that a reader on a web page sees the plots; `make notebook` executes it again."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    kinds = [kind for cell in cells for output in cell.outputs for kind in output.get("data", ())]
    assert kinds.count("image/png") == 3
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    text = NOTEBOOK.read_text()
    assert "runs/tour/a" in text and not re.search(r"/(home|root|work|Users|tmp)/", text)
