"""Each environment variable of accelerate has no effect on the numbers, or is rejected by its name."""

import re
from pathlib import Path

import accelerate
import pytest

from forge_lib.distributed.environment import HARMLESS, HARMLESS_BEGINNINGS, REJECTED, check_environment
from forge_lib.errors import UserError


def test_every_variable_in_the_source_of_accelerate_is_known():
    """A new version of accelerate may read a new one: then decide to which list it belongs."""
    source = "".join(path.read_text() for path in Path(accelerate.__file__).parent.rglob("*.py"))
    found = set(re.findall(r"\bACCELERATE_[A-Z0-9_]+", source))
    assert len(found) > 20
    unknown = {name for name in found - HARMLESS - REJECTED.keys() if not name.startswith(HARMLESS_BEGINNINGS)}
    assert not unknown


@pytest.mark.parametrize("name", REJECTED)
def test_a_variable_that_would_change_the_results_is_rejected_by_its_name(monkeypatch, name):
    harmless, instead = REJECTED[name]
    for value in ("", *harmless, *(each.upper() for each in harmless)):
        monkeypatch.setenv(name, value)
        check_environment()
    monkeypatch.setenv(name, "4" if name.endswith("STEPS") else "true")
    with pytest.raises(
        UserError, match=f"the environment variable {name}=.* would change the results: unset it;"
    ) as error:
        check_environment()
    assert instead in str(error.value)


@pytest.mark.parametrize("value", ["1", "true"])
def test_a_harmless_variable_is_accepted(monkeypatch, value):
    for name in HARMLESS:
        monkeypatch.setenv(name, value)
    check_environment()
