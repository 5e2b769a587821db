"""Starts the command p2p-llm-forge for the tests of this folder."""

import pytest
from commands import QUIET, SHORT
from forked_command import ForkedCommand

FLAGS = [*SHORT, *QUIET, "--max-steps", "3"]


@pytest.fixture
def forge(tmp_path):
    """Starts the command in a fork, with a small run in `folder`; kills it when the test ends if it still runs."""
    started = []

    def forge(*flags, folder: str = "run") -> ForkedCommand:
        words = [*FLAGS, "--output-dir", tmp_path / folder, *flags]
        started.append(ForkedCommand(words, tmp_path / f"forge_{len(started)}.log"))
        return started[-1]

    yield forge
    for command in started:
        command.kill()
