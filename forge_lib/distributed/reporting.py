"""How a program ends: one message and the exit code of its error, on this process and on all others."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from forge_lib.errors import DivergedError, PeerLostError, Stopped, UserError, as_user_error, exit_code
from forge_lib.process import World


@contextmanager
def report_errors(program: str) -> Iterator[None]:
    """Turns an error that a user can act on into one message and its exit code, here and on all other processes.

    Also turns off transformers' progress bars if stderr is not a terminal.

    Args:
        program: its name, which starts the message.
    """
    if not sys.stderr.isatty():
        _disable_progress_bars()
    try:
        yield
    except (UserError, PeerLostError, DivergedError, Stopped) as caught:
        error = caught
        if isinstance(caught, Stopped) and isinstance(caught.__context__, UserError):
            error = caught.__context__  # the launcher sent SIGTERM while this process was ending because of that error
    except Exception as caught:
        error = as_user_error(caught)
        if error is caught:
            if not _has_process_group():
                raise
            traceback.print_exc()
            _end(1)
    else:
        if _has_stuck_thread():
            _end(0)
        gc.freeze()  # skips the last garbage collections: about a second with transformers' classes loaded
        return
    prefix = "" if isinstance(error, Stopped) else "error: "
    print(f"{program}: {prefix}{error}", file=sys.stderr, flush=True)
    if isinstance(error, UserError):
        _report_to_peers(error)
    _end(exit_code(error))


def _disable_progress_bars() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it when it is imported
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _report_to_peers(error: UserError) -> None:
    """Reports an error, such as an unknown flag, that this process found before it used the side channel."""
    try:
        world = World.from_environment()
        if world.num_processes > 1:
            from forge_lib.distributed.peers import Peers  # imports torch, which one process alone does not need

            if not Peers.was_opened:
                with Peers(world):
                    raise error
    except (UserError, RuntimeError):
        pass  # the error was raised again, or no other process can be reached


def _end(code: int) -> None:
    """Ends this process. Python's normal exit would hang with a failed process group or a thread on a silent link."""
    if _has_process_group() or _has_stuck_thread():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# Without torch, this process has no group and no such thread; importing torch to check would take seconds.


def _has_process_group() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _has_stuck_thread() -> bool:
    if "torch" not in sys.modules:
        return False
    from forge_lib.distributed.peers import Peers

    return Peers.has_stuck_thread
