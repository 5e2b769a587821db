"""docs/faults.md quotes the messages of the code as they are now, and has a row for each message."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT

from forge_lib.errors import EXIT_DIVERGED, EXIT_PEER_LOST, EXIT_USER_ERROR

PAGE = "\n".join((ROOT / "docs" / name).read_text() for name in ("faults.md", "slow-links.md", "observe.md"))
VALUE = "\0"  # stands for a value in a message of the code; the page writes `…`

# How a text in the code becomes part of a message: as an argument of one of these calls, an item appended to one of
# these lists, the value of one of these variables, or the return value of a function with one of these prefixes.
ERRORS = {"UserError", "UnavailableError", "PeerLostError", "DivergedError", "Stopped", "LinkError", "ValueError"}
CALLS = ERRORS | {"Problem", "Outcome", "_error", "_lost", "lost_processes", "lost_main_machine", "Verdict"}
CALLS |= {"print_message", "warning", "error"}  # the last two of a logger
LISTS = {"mistakes", "errors", "warnings", "skipped", "foreign", "found"}
VARIABLES = {"mistake", "mistakes", "problem", "error", "fix", "reason", "failure", "warnings", "text", "cause"}
VARIABLES |= {"MULTI_CPU_FIX", "SAME_PROGRAM", "OTHER_FORM", "RESUME_HINT", "LAUNCHER_STOPPED", "FIXES", "OTHER_FIX"}
FUNCTIONS = ("_check", "find_", "_find_", "_explain", "_describe", "explain_", "_exchange_messages", "_ask", "_fix")
FUNCTIONS += ("describe_failure", "_reason", "warn", "public_address_warning")
NOT_ERRORS = {
    "the main machine",  # a value in several messages
    "not a message of this program",  # for these three, a user sees `another program … answers at`
    "a message of another form",
    "nested too deeply",
}


def text_of(node: ast.AST) -> str | None:
    """Returns a string or an f-string of the code, with VALUE for each value; None for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    else:
        return None
    return " ".join(text.split())


def texts_in(node: ast.AST) -> Iterator[str]:
    """Yields each string and f-string in a node; adjacent literals are one."""
    if (text := text_of(node)) is not None:
        yield text
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from texts_in(child)


def name_of(node: ast.AST | None) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def shown_parts(node: ast.AST) -> list[ast.AST]:
    """Returns the parts of a node whose texts a user may see."""
    if isinstance(node, ast.Call):
        owner = name_of(getattr(node.func, "value", None))
        is_append = name_of(node.func) == "append" and owner in LISTS | {"lines"}
        is_error_line = name_of(node.func) == "print" and any(t.startswith("error:") for t in texts_in(node))
        return [node] if is_append or is_error_line or name_of(node.func) in CALLS else []
    if isinstance(node, ast.Assign):
        return [node.value] if any(name_of(target) in VARIABLES for target in node.targets) else []
    if isinstance(node, ast.AugAssign):
        return [node.value] if name_of(node.target) in VARIABLES | LISTS else []
    if isinstance(node, ast.FunctionDef) and node.name.startswith(FUNCTIONS):
        return [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
    return []


def quoted(text: str) -> list[str]:
    """Returns the messages, or pieces of messages, that a part of the page quotes."""
    return [quote.strip() for _, quote in re.findall(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)", text)]


def pattern(quote: str) -> re.Pattern:
    """Returns a regular expression that finds a quote in a text of the code: its words, with anything for each `…`."""
    pieces = [piece.strip() for piece in quote.split("…")]
    return re.compile(".*?".join(re.escape(piece) for piece in pieces if piece))


def num_words(text: str) -> int:
    return len(re.findall(r"[^\W\d_]{2,}", text))


def rows(page: str) -> list[str]:
    """Returns the first cell of each row in the tables of messages."""
    tables = page.split("| message | cause | fix |\n| --- | --- | --- |\n")[1:]
    return [line.split(" | ")[0] for table in tables for line in table.split("\n\n")[0].splitlines()]


def unknown_quotes(page: str, sources: list[ast.AST]) -> list[str]:
    """Returns the quotes of messages that are in no text of the code."""
    texts = "\n".join(text for tree in sources for text in texts_in(tree))
    return [quote for row in rows(page) for quote in quoted(row) if not pattern(quote).search(texts)]


def missing_messages(page: str, sources: list[ast.AST]) -> list[str]:
    """Returns the messages of the code that no quote on the page finds; quotes of one or two words find nothing."""
    nodes = [node for tree in sources for node in ast.walk(tree)]
    texts = {text for node in nodes for part in shown_parts(node) for text in texts_in(part) if " " in text}
    texts = {text for text in texts if num_words(text) >= 3 and text not in NOT_ERRORS}
    known = [pattern(quote) for quote in quoted(page) if num_words(quote) >= 3]
    return sorted(text for text in texts if not any(each.search(text) for each in known))


def source_trees() -> list[ast.AST]:
    """Returns the code of forge_lib and scripts, and of argparse, which has messages about flags."""
    paths = [path for folder in ("forge_lib", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [ast.parse(path.read_text()) for path in paths]


SOURCES = source_trees()


def test_each_quoted_message_is_in_the_code():
    assert len(rows(PAGE)) > 100
    assert unknown_quotes(PAGE, [*SOURCES, ast.parse(Path(argparse.__file__).read_text())]) == []


def test_each_message_of_the_code_is_on_the_page():
    assert missing_messages(PAGE, SOURCES) == []


def test_a_message_that_was_reworded_is_found():
    page = "| message | cause | fix |\n| --- | --- | --- |\n| `… is an old message of …` | | |\n"
    code = 'def check(x):\n    raise UserError(f"{x} is a new " f"message of {x}")\n'
    assert unknown_quotes(page, [ast.parse(code)]) == ["… is an old message of …"]
    assert missing_messages(page, [ast.parse(code)]) == [f"{VALUE} is a new message of {VALUE}"]
    new_page = page.replace("an old", "a new")
    assert unknown_quotes(new_page, [ast.parse(code)]) == missing_messages(new_page, [ast.parse(code)]) == []


def test_the_page_has_every_exit_code():
    codes = (0, 1, EXIT_USER_ERROR, EXIT_PEER_LOST, EXIT_DIVERGED)
    assert [code for code in codes if f"| {code} |" not in PAGE] == []
