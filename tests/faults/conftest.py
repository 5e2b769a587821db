"""Fixtures of the fault tests."""

from pathlib import Path

import pytest
from commands import accelerate_launcher, find_free_port
from marked_processes import processes_with
from rig import FLAGS, STEPS, Rig

from forge_lib.process import is_running


@pytest.fixture(scope="session")
def undisturbed(make_once, tmp_path_factory, home):
    """Returns the folder of a run without faults: `undisturbed(num_steps, num_processes)`."""

    def undisturbed(num_steps: int = STEPS, num_processes: int = 2) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        launcher = accelerate_launcher(folder, find_free_port(), num_processes=num_processes)
        words = [*launcher, "scripts/train.py", *FLAGS, "--max-steps", num_steps, "--output-dir", "OUTPUT"]
        return make_once(f"undisturbed_{num_steps}_{num_processes}", words, warm=True)

    return undisturbed


@pytest.fixture
def make_rig(start, tmp_path, free_port):
    """Makes a rig: `make_rig()` on this machine, `make_rig(hosts(2))` on machines with their own network."""
    made = []

    def make_rig(hosts=None, num_machines: int = 2) -> Rig:
        made.append(Rig(start, tmp_path, free_port, hosts, num_machines))
        return made[-1]

    yield make_rig
    for each in made:
        for process in processes_with(each.word):
            if is_running(process):
                process.kill()
