"""docs/faults.md quotes the messages of the code as they are now."""

import ast
import re

import pytest
from commands import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text()


def joined(node: ast.AST) -> str:
    """Returns a string constant or an f-string with `…` for each value; adjacent literals are one in the tree."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def source_texts() -> str:
    """Returns all texts in the code of forge_lib and scripts, one per line."""
    texts = []
    for folder in ("forge_lib", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant | ast.JoinedStr):
                    texts.append(joined(node))
    return "\n".join(texts)


TEXTS = source_texts()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_the_quoted_words_of_a_row_are_in_the_code(row):
    """Between two values (`…`), each piece of a quoted message is in one text of the code."""
    for message in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
        for piece in filter(None, (part.strip(" ;:") for part in message.split("…"))):
            assert piece in TEXTS, f"{piece!r} of {message!r}"


def test_the_page_covers_every_exit_code():
    from forge_lib.errors import EXIT_DIVERGED, EXIT_PEER_LOST, EXIT_USER_ERROR

    assert [f"| {code} |" in PAGE for code in (0, 1, EXIT_USER_ERROR, EXIT_PEER_LOST, EXIT_DIVERGED)] == [True] * 5
