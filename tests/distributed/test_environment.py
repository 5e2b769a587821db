"""Each environment variable of accelerate has no effect on the numbers, or is rejected by its name."""

import re
from pathlib import Path

import accelerate
import pytest
import torch

from forge_lib.distributed.environment import (
    HARMLESS,
    HARMLESS_BEGINNINGS,
    HARMLESS_OF_TORCH,
    REJECTED,
    check_environment,
)
from forge_lib.errors import UserError


def test_every_variable_in_the_source_of_accelerate_is_known():
    """A new version of accelerate may read a new one: then decide to which list it belongs."""
    source = "".join(path.read_text() for path in Path(accelerate.__file__).parent.rglob("*.py"))
    found = set(re.findall(r"\bACCELERATE_[A-Z0-9_]+", source))
    assert len(found) > 20
    unknown = {name for name in found - HARMLESS - REJECTED.keys() if not name.startswith(HARMLESS_BEGINNINGS)}
    assert not unknown


def test_every_variable_in_the_source_of_ddp_process_groups_and_autocast_is_known():
    folder = Path(torch.__file__).parent
    places = ("nn/parallel/*.py", "amp/*.py", "distributed/distributed_c10d.py", "distributed/rendezvous.py")
    source = "".join(path.read_text() for place in places for path in folder.glob(place))
    found = set(re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\s*[\"']([A-Z_0-9]+)", source))
    assert len(found) > 5
    assert not found - HARMLESS_OF_TORCH - REJECTED.keys()


@pytest.mark.parametrize("name", REJECTED)
def test_a_variable_that_would_change_the_results_is_rejected_by_its_name(monkeypatch, name):
    harmless, instead = REJECTED[name]
    for value in {*harmless, *map(str.upper, harmless)}:
        monkeypatch.setenv(name, value)
        check_environment()
    for value in ("4" if name.endswith("STEPS") else "true", ""):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"{name}={value} would change the results: unset it;") as error:
            check_environment()
        assert instead in str(error.value)


def test_accelerate_takes_every_value_that_is_said_to_be_harmless(monkeypatch):
    for name, (harmless, _) in REJECTED.items():
        if harmless:
            monkeypatch.setenv(name, harmless[0])
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    assert accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize("value", ["1", "true"])
def test_a_harmless_variable_is_accepted(monkeypatch, value):
    for name in HARMLESS:
        monkeypatch.setenv(name, value)
    check_environment()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU= is neither true nor false"):
        check_environment()
