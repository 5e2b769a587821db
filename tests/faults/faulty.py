"""scripts/train.py with faults in it, of which its own code knows nothing: this program changes forge_lib and runs it.

    FAULTS='[{"do": "kill", "at": "computing", "step": 7, "rank": 1}]' \
        accelerate launch --config_file … tests/faults/faulty.py --model-name … --output-dir …
    FAULTS='…' python tests/faults/faulty.py p2p-llm-forge --num-nodes 2 … --output-dir …

A fault happens when a process says (`Peers.say`) that it is doing what stands under `at`; `at: importing` is before it
has met the others, `at: leaving` when it has met them for the last time, `at: finalizing` when Python ends, `at:
copying` when a checkpoint's tensors are about to be copied, of whatever step, and `at: writing` when they are written
and its manifest is not. Where they are given it happens only in this `step` (from 1; the one that runs) and on this
`rank`, and only once whatever is started again, where a path is given under `once`. A line `FAULT …` says so just
before. What it does:

    sleep (seconds), kill, stop (SIGSTOP), term, int (signals to itself), kill_launcher, term_launcher,
    kill_supervisor, raise, nan (this step's loss), weight (one is changed by 1e-3),
    limit (bytes that a file may have; 0: as before)
"""

import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import psutil
import torch

from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints import saver
from forge_lib.distributed import peers
from forge_lib.launch import launch
from forge_lib.models import loss, optimizers

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}


class Faults:
    """The faults of this process, and what they need to know of it."""

    def __init__(self, wanted: list[dict]):
        self.wanted = wanted
        self.rank = int(os.environ.get("RANK", 0))
        self.nan = False
        self.done: set[int] = set()
        self.parameters: list[torch.nn.Parameter] = []

    def at(self, place: str, step: int) -> None:
        """Lets happen what shall happen here, in this step."""
        for number, fault in enumerate(self.wanted):
            if (
                place == fault["at"]
                and fault.get("rank", self.rank) == self.rank
                and self._is_due(number, fault, step)
            ):
                if "step" in fault or "once" in fault:
                    where = f"{place}, step {step}, rank {self.rank}, pid {os.getpid()}"
                    print(f"\nFAULT {fault['do']}: {where}, time {time.time():.3f}", file=sys.stderr, flush=True)
                self._do(**fault)

    def _is_due(self, number: int, fault: dict, step: int) -> bool:
        if "step" in fault and (fault["step"] != step or number in self.done):
            return False
        self.done.add(number)
        if "once" in fault:
            try:
                os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
        return True

    def _do(self, do: str, seconds: float = 0.0, bytes: int = 0, **_) -> None:
        own = psutil.Process()
        if do == "sleep":
            time.sleep(seconds)
        elif do in SIGNALS:
            own.send_signal(SIGNALS[do])
            time.sleep(0.1)
        elif do == "kill_launcher":
            own.parent().kill()
        elif do == "term_launcher":
            own.parent().terminate()
        elif do == "kill_supervisor":
            own.parent().parent().kill()
        elif do == "raise":
            raise RuntimeError("injected")
        elif do == "nan":
            self.nan = True
        elif do == "weight":
            with torch.no_grad():
                self.parameters[0].view(-1)[0] += 1e-3
        elif do == "limit":
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes or most, most))
        else:
            raise ValueError(do)


class Late:
    """Is collected when Python ends, with other threads still there: then `at: finalizing` happens."""

    def __init__(self, faults: Faults):
        self.faults, self.at = faults, Faults.at

    def __del__(self):
        self.at(self.faults, "finalizing", 0)


def inject(faults: Faults) -> None:
    """Changes forge_lib in this process."""
    say, leave, write_bytes = peers.Peers.say, peers.Peers.__exit__, checkpoint.write_bytes
    loss_sum, build_optimizers, copy = loss.loss_sum, optimizers.build_optimizers, saver.copy_tensors

    def faulty_say(self: peers.Peers, doing: str) -> None:
        say(self, doing)
        faults.at(doing, self.step + (doing in ("reading its batch", "computing")))

    def faulty_exit(self: peers.Peers, *error) -> None:
        faults.at("leaving", self.step)
        leave(self, *error)

    def faulty_copy(*args) -> checkpoint.Tensors:
        faults.at("copying", 0)
        return copy(*args)

    def faulty_write_bytes(path: Path, data: bytes) -> str:
        if path.name == "manifest.json":
            faults.at("writing", int(path.parent.name.rpartition("-")[2]))
        return write_bytes(path, data)

    def faulty_loss_sum(*args) -> torch.Tensor:
        factor, faults.nan = (float("nan") if faults.nan else 1.0), False
        return loss_sum(*args) * factor

    def faulty_build_optimizers(model: torch.nn.Module, *args) -> list:
        faults.parameters = [p for p in model.parameters() if p.requires_grad]
        return build_optimizers(model, *args)

    peers.Peers.say, peers.Peers.__exit__ = faulty_say, faulty_exit
    saver.copy_tensors, checkpoint.write_bytes = faulty_copy, faulty_write_bytes
    loss.loss_sum, optimizers.build_optimizers = faulty_loss_sum, faulty_build_optimizers


if __name__ == "__main__":
    if sys.argv[1] == "p2p-llm-forge":
        launch.SCRIPT = Path(__file__)
        launch.main(sys.argv[2:])
    else:
        faults = Faults(json.loads(os.environ.get("FAULTS", "[]")))
        faults.at("importing", 0)
        inject(faults)
        late = Late(faults)
        sys.argv[0] = str(TRAIN)
        runpy.run_path(str(TRAIN), run_name="__main__")
