"""Runs scripts/train.py with injected faults: it replaces parts of forge_lib, which has no test hooks.

    FAULTS='[{"do": "kill", "at": "computing", "step": 7, "rank": 1}]' \
        accelerate launch --config_file … tests/faults/faulty.py --model-name … --output-dir …
    FAULTS='…' python tests/faults/faulty.py p2p-llm-forge --num-nodes 2 … --output-dir …

A fault happens when a process sets the status (`Peers.set_status`) given as `at`, or at one of these moments:

    importing     before the process imports train.py
    copying       before a save copies the tensors, in any step
    writing       when a checkpoint's tensors are written, but not its manifest
    leaving       after the last barrier
    finalizing    when Python ends

With `step` (from 1; the running one), `rank` or both, it happens only there; with `once`, a path, only once over all
restarts. A fault with `step` or `once` prints a line `FAULT …` first. What `do` may be:

    sleep (seconds)
    kill, stop, term, int                             SIGKILL, SIGSTOP, SIGTERM, SIGINT to itself
    kill_launcher, term_launcher, kill_supervisor
    raise                                             a RuntimeError
    nan                                               the loss of this step
    weight                                            changes one weight by 1e-3
    limit (bytes)                                     the largest size of a file; 0: as before
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

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}


class Faults:
    """The faults of this process, and the state that they need."""

    def __init__(self, faults: list[dict]):
        self.faults = faults
        self.rank = int(os.environ.get("RANK", 0))
        self.is_nan = False
        self.done: set[int] = set()
        self.parameters: list = []

    def at(self, place: str, step: int) -> None:
        """Injects the faults that are due at this place, in this step."""
        for number, fault in enumerate(self.faults):
            is_here = place == fault["at"] and fault.get("rank", self.rank) == self.rank
            if is_here and self._is_due(number, fault, step):
                if "step" in fault or "once" in fault:
                    where = f"{place}, step {step}, rank {self.rank}, pid {os.getpid()}"
                    print(f"\nFAULT {fault['do']}: {where}, time {time.time():.3f}", file=sys.stderr, flush=True)
                self._inject(**fault)

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

    def _inject(self, do: str, seconds: float = 0.0, bytes: int = 0, **_) -> None:
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
            self.is_nan = True
        elif do == "weight":
            self.parameters[0].data.view(-1)[0] += 1e-3
        elif do == "limit":
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes or most, most))
        else:
            raise ValueError(do)


class AtExit:
    """Python deletes this object when it ends, while other threads still run: then `at: finalizing` happens."""

    def __init__(self, faults: Faults):
        self.faults, self.at = faults, Faults.at

    def __del__(self):
        self.at(self.faults, "finalizing", 0)


def replace_parts(faults: Faults) -> None:
    """Replaces functions of forge_lib in this process, before anything imports them by name."""
    from forge_lib.checkpoints import format as checkpoint
    from forge_lib.checkpoints import saver
    from forge_lib.distributed.peers import Peers
    from forge_lib.models import loss, optimizers

    set_status, leave, write_bytes = Peers.set_status, Peers.__exit__, checkpoint.write_bytes
    loss_sum, build_optimizers, copy_tensors = loss.loss_sum, optimizers.build_optimizers, saver.copy_tensors

    def faulty_set_status(self, status: str) -> None:
        set_status(self, status)
        faults.at(status, self.step + (status in ("reading its batch", "computing")))

    def faulty_exit(self, *error) -> None:
        faults.at("leaving", self.step)
        leave(self, *error)

    def faulty_copy_tensors(*args):
        faults.at("copying", 0)
        return copy_tensors(*args)

    def faulty_write_bytes(path: Path, data: bytes) -> str:
        if path.name == "manifest.json":
            faults.at("writing", int(path.parent.name.rpartition("-")[2]))
        return write_bytes(path, data)

    def faulty_loss_sum(*args):
        factor, faults.is_nan = (float("nan") if faults.is_nan else 1.0), False
        return loss_sum(*args) * factor

    def faulty_build_optimizers(model, *args) -> list:
        faults.parameters = [p for p in model.parameters() if p.requires_grad]
        return build_optimizers(model, *args)

    Peers.set_status, Peers.__exit__ = faulty_set_status, faulty_exit
    saver.copy_tensors, checkpoint.write_bytes = faulty_copy_tensors, faulty_write_bytes
    loss.loss_sum, optimizers.build_optimizers = faulty_loss_sum, faulty_build_optimizers


def launch(words: list[str]) -> None:
    """Runs p2p-llm-forge with this program instead of train.py."""
    from forge_lib.launch import attempt, command

    attempt.SCRIPT = Path(__file__)
    command.main(words)


if __name__ == "__main__":
    if sys.argv[1] == "p2p-llm-forge":
        launch(sys.argv[2:])
    else:
        faults = Faults(json.loads(os.environ.get("FAULTS", "[]")))
        replace_parts(faults)
        faults.at("importing", 0)
        at_exit = AtExit(faults)
        sys.argv[0] = str(TRAIN)
        runpy.run_path(str(TRAIN), run_name="__main__")
