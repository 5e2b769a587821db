"""Each row of the README's table "What a run survives" has a test in this folder that quotes it."""

import ast
from pathlib import Path

from commands import ROOT


def rows_of_readme() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## What a run survives\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def docstrings_of_tests() -> list[str]:
    modules = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")]
    functions = [node for module in modules for node in module.body if isinstance(node, ast.FunctionDef)]
    return [" ".join((ast.get_docstring(each) or "").split()) for each in functions if each.name.startswith("test_")]


def test_each_row_of_the_readmes_fault_table_is_quoted_by_a_test():
    rows, docstrings = rows_of_readme(), docstrings_of_tests()
    assert len(rows) > 8
    assert [row for row in rows if not any(" ".join(row.split()) in text for text in docstrings)] == []
