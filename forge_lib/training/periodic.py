"""When periodic work is due: every N steps and after the last one, also if several steps are completed at once."""


class Periodic:
    """Counts the completed steps of a run.

    Args:
        step: completed when the loop begins.
        num_steps: of the run.

    Attributes:
        has_begun: whether `advance` has been called.
    """

    def __init__(self, step: int, num_steps: int):
        self.has_begun, self._step, self._previous, self._num_steps = False, step, step, num_steps

    def advance(self, step: int, since: int | None = None) -> None:
        """Sets the number of completed steps; what became due since step `since`, or the last call, is then due."""
        self.has_begun, self._previous, self._step = True, self._step if since is None else since, step

    def is_due(self, every: int) -> bool:
        """Returns whether work is due that is done every `every` steps, or never for 0.

        Before the loop, it is due in a new run and in one that is already complete.
        """
        is_last = self._step == self._num_steps
        if not self.has_begun:
            return every > 0 and (self._step == 0 or is_last)
        has_advanced = self._step > self._previous
        return every > 0 and has_advanced and (is_last or self._step // every > self._previous // every)
