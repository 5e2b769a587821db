"""The check of an installation, as a user starts it."""

import sys

from commands import ROOT


def test_the_smoke_test_passes_and_says_what_it_checked(run):
    ended = run([sys.executable, "tests/smoke_single_node.py"], timeout=200)
    assert ended.code == 0, ended.output
    last = ended.output.splitlines()[-1]
    assert last.startswith("smoke test passed: ") and "the final model loads" in last
    assert (ROOT / "artifacts" / "smoke" / "final" / "model.safetensors").is_file()
