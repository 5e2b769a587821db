"""Sends metrics to accelerate's trackers; one that fails is dropped with a warning, and never stops the run."""

import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from forge_lib.errors import UserError, first_line

logger = logging.getLogger("forge")

PROJECT = "p2p-llm-forge"
INSTALL = "pip install 'p2p-llm-forge[dashboard]' installs trackio and tensorboard"


def choose_trackers(report_to: str) -> list[str]:
    """Returns the names in `--report-to` whose packages are installed, and warns of the others.

    Raises:
        UserError: there is no such tracker.
    """
    if report_to == "none":
        return []
    available, known = [str(each) for each in get_available_trackers()], [str(each) for each in LoggerType]
    chosen = []
    for name in report_to.split(","):
        if name not in known:
            raise UserError(f"--report-to {name}: no such tracker; expected {', '.join(known)} or none")
        if name == "all" or name in available:
            chosen.append(name)
        else:
            logger.warning(f"--report-to {name}: its package is not installed, so nothing is sent to it; {INSTALL}")
    return chosen if available else []


class Trackers:
    """The trackers of a run; only the main process sends anything.

    Args:
        accelerator: knows their names.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def start(self, name: str, config: dict[str, Any]) -> None:
        """Starts a run in each tracker.

        Args:
            name: of the run.
            config: every flag.
        """
        if not self._accelerator.log_with:
            return
        values = {key: value for key, value in config.items() if isinstance(value, str | int | float | bool)}
        options = {"trackio": {"name": name}, "wandb": {"name": name}}
        try:
            self._accelerator.init_trackers(PROJECT, config=values, init_kwargs=options)
        except Exception as error:  # whatever a tracker raises
            self._accelerator.trackers = []
            logger.warning(
                f"the trackers of --report-to cannot start: {first_line(error)}; the run goes on without them"
            )

    def log(self, values: dict[str, Any], step: int) -> None:
        """Sends numbers."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Sends a text to the trackers that show texts: trackio and tensorboard."""

        def send(tracker: Any) -> None:
            if tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Markdown(text)}, step=step)
            elif tracker.name == "tensorboard":
                tracker.tracker.add_text(name, text, step)

        self._each(send)

    def finish(self) -> None:
        """Ends the run in each tracker; that may take a while."""

        def end(tracker: Any) -> None:
            if tracker.name == "trackio":  # accelerate's own call leaves it to trackio to end the run again at exit
                import trackio

                trackio.finish()
            else:
                tracker.finish()

        self._each(end)
        self._accelerator.trackers = []

    def _each(self, call: Callable[[Any], None]) -> None:
        if not self._accelerator.is_main_process:
            return
        for tracker in [*self._accelerator.trackers]:
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker raises
                self._accelerator.trackers.remove(tracker)
                logger.warning(
                    f"the tracker {tracker.name} has failed: {first_line(error)}; the run goes on without it"
                )
