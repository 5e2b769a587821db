"""Sends metrics to accelerate's trackers; one that fails is dropped with a warning, and never stops the run."""

import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from forge_lib.config import TrainConfig
from forge_lib.errors import UserError, first_line
from forge_lib.process import World

logger = logging.getLogger("forge")

PROJECT = "p2p-llm-forge"
INSTALL = "pip install 'p2p-llm-forge[dashboard]' installs trackio and tensorboard"


def choose_trackers(config: TrainConfig, world: World) -> list[str]:
    """Returns the names in `--report-to` whose packages are installed; the main process warns of the others.

    Raises:
        UserError: there is no such tracker.
    """
    if config.report_to == "none":
        return []
    available, known = [str(each) for each in get_available_trackers()], [str(each) for each in LoggerType]
    chosen = []
    for name in config.report_to.split(","):
        if name not in known:
            raise UserError(f"--report-to {name}: no such tracker; expected {', '.join(known)} or none")
        if name in available or (name == "all" and available):
            chosen += available if name == "all" else [name]
        elif world.process_index == 0:
            logger.warning(f"--report-to {name}: its package is not installed, so nothing is sent to it; {INSTALL}")
    return list(dict.fromkeys(chosen))


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
        values = {key: value for key, value in config.items() if isinstance(value, str | int | float | bool)}
        options = {"trackio": {"name": name}, "wandb": {"name": name}}
        wanted, started = self._accelerator.log_with, []
        for each in wanted:  # one by one: one that cannot start must not take the others with it
            self._accelerator.log_with, self._accelerator.trackers = [each], []  # it starts all that are in the list
            try:
                self._accelerator.init_trackers(PROJECT, config=values, init_kwargs=options)
                started += self._accelerator.trackers
            except Exception as error:  # whatever a tracker raises
                logger.warning(f"the tracker {each} cannot start: {first_line(error)}; the run goes on without it")
        self._accelerator.log_with, self._accelerator.trackers = wanted, started

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
