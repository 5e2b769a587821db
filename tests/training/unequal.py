"""Runs scripts/train.py on processes of pretended speeds, which follow a plan.

    SPEEDS='{"0": [3, 1], "30": [1, 3]}' accelerate launch --config_file … tests/training/unequal.py --balance auto …

From the step on (from 0), each process says that it computes so many sequences per second, by rank. With `KILL_AT`, a
step, process 1 kills itself there. With `FREE_MEMORY`, in bytes, process 1 has no more. True times and limits are the
subject of tests/training/measure_balance.py.
"""

import json
import os
import runpy
import signal
from pathlib import Path

from forge_lib.training import micro_batch
from forge_lib.training.step_log import StepLog

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"

step_done = StepLog.step_done


def unequal_step_done(self, step: int, *args) -> None:
    """Replaces the measured time of the step by the pretended one."""
    step_done(self, step, *args)
    plan, rank = json.loads(os.environ.get("SPEEDS", "{}")), self.accelerator.process_index
    if plan:
        speeds = plan[max((begin for begin in plan if int(begin) < step), key=int)]
        self.own_seconds = self._balancer.used[rank] / speeds[rank]
    if rank == 1 and step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)


StepLog.step_done = unequal_step_done
if "FREE_MEMORY" in os.environ and os.environ.get("RANK") == "1":
    micro_batch.free_memory = lambda num_local_processes: int(os.environ["FREE_MEMORY"])
runpy.run_path(str(TRAIN), run_name="__main__")
