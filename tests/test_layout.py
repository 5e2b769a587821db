"""The structure that CONTRIBUTING.md promises: imports go one way, and files and functions stay small."""

import ast
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT

LIBRARY = ROOT / "forge_lib"
# A module imports from its own folder and from groups to its left.
GROUPS = [
    {"errors", "disk", "config", "peers_config", "flags", "process", "progress"},
    {"data", "models", "checkpoints", "distributed", "cluster", "report"},
    {"training", "launch"},
    {"elastic"},
    {"check"},
    {"benchmark"},
]
EXCEPTIONS: dict[tuple[str, str], str] = {}  # (importing folder, imported folder): the reason


def rank_of(name: str) -> int:
    return next(rank for rank, group in enumerate(GROUPS) if name in group)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yields the name of each module that a file imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level  # relative: not allowed, since it hides which folder is meant
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken_imports(path: Path, source: str) -> list[str]:
    """Returns the imports of forge_lib in a file of forge_lib or scripts that break the rule."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    broken = []
    for module in imported_modules(ast.parse(source)):
        words = module.split(".")
        if words[0] in ("scripts", "") or (parts[0] == "scripts" and (ROOT / "scripts" / f"{module}.py").exists()):
            broken.append(f"{path.relative_to(ROOT)} imports {module}")
        if words[0] != "forge_lib" or parts[0] == "scripts":
            continue
        own, other = parts[1], words[1]
        is_allowed = own == other or rank_of(other) < rank_of(own) or (rank_of(own) == rank_of(other) == 0)
        if not is_allowed and (own, other) not in EXCEPTIONS:
            broken.append(f"{path.relative_to(ROOT)} imports {module}")
    return broken


def test_imports_go_from_right_to_left_only():
    """{errors, disk, ...} < {data, models, ...} < {training, launch} < {elastic} < {check} < {benchmark} < scripts."""
    paths = [path for folder in ("forge_lib", "scripts") for path in (ROOT / folder).rglob("*.py")]
    broken = [
        line for path in paths if path != LIBRARY / "__init__.py" for line in broken_imports(path, path.read_text())
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("forge_lib/data/corpus.py", "from forge_lib.models.loading import load_model"),
        ("forge_lib/models/loss.py", "from forge_lib.training.run import Run"),
        ("forge_lib/process.py", "import forge_lib.distributed.peers"),
        ("forge_lib/training/run.py", "from forge_lib.launch import ssh"),
        ("forge_lib/models/loss.py", "from ..training.run import Run"),
        ("scripts/train.py", "from scripts.evaluate import main"),
        ("scripts/train.py", "import generate"),
    ],
)
def test_a_line_that_breaks_the_import_rule_is_found(path, line):
    source = (ROOT / path).read_text()
    assert not broken_imports(ROOT / path, source)
    assert len(broken_imports(ROOT / path, f"{source}\n\ndef f():\n    {line}\n")) == 1


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the name and the number of lines of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_the_training_loop_and_its_script_can_be_read_in_one_go():
    script = ROOT / "scripts" / "train.py"
    assert dict(functions(script))["train"] < 100
    assert len(script.read_text().splitlines()) < 250


def test_files_and_functions_of_the_library_stay_small():
    for path in LIBRARY.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
        for name, length in functions(path):
            assert length <= 60, f"{path}: {name} has {length} lines"


def test_each_folder_of_the_library_says_in_one_sentence_what_it_is_for():
    for folder in [path for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"]:
        tree = ast.parse((folder / "__init__.py").read_text())
        assert len(tree.body) == 1 and ast.get_docstring(tree).endswith("."), folder


def test_the_page_how_it_works_names_each_file_of_the_library_once():
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    named = re.findall(r"`(\w+\.py)`", page[page.index("| Topic |") :])
    assert sorted(named) == sorted(path.name for path in LIBRARY.rglob("*.py") if path.name != "__init__.py")


# The lines by which the loop of train_elastic.py differs from that of train.py: what it adds, and what it replaces.
LOOP_DIFFERENCES = """
-    config: TrainConfig, run: Run, accelerator: Accelerator, inputs: Inputs, optimizers: list[torch.optim.Optimizer]
+    config: ElasticConfig,
+    run: Run,
+    rounds: Rounds,
+    accelerator: Accelerator,
+    inputs: Inputs,
+    optimizers: list[torch.optim.Optimizer],
-    run.begin(model, optimizers)
+    run.begin(model, optimizers, also_save=[rounds.outer])
+    learning_rate = rounds.begin(optimizers, learning_rate)
-        evaluate(run, model)
+        rounds.evaluate(model)
-    for step, blocks, batch in run.steps():
+    for step, blocks, batch in run.steps(rounds.batches()):
-        num_targets = max(1, inputs.dataset.num_targets(blocks))
+        num_targets = max(1, rounds.num_targets(blocks))
+        rounds.add_gradients()
-        total_loss, grad_norm = run.totals(grad_norm)
+        total_loss, grad_norm = rounds.totals(grad_norm)
-        if run.may_update(mean_loss, grad_norm):
+        if rounds.may_update() and run.may_update(mean_loss, grad_norm):
-        run.step_done(mean_loss, grad_norm, learning_rate(step))
+        rounds.step_done(mean_loss, grad_norm)
-            evaluate(run, model)
+            rounds.evaluate(model)
"""


def loop_lines(script: str) -> list[str]:
    """Returns the lines of a script's `train()`, without its docstring and comments."""
    source = (ROOT / "scripts" / script).read_text()
    (node,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    lines = source.splitlines()
    head = lines[node.lineno - 1 : node.body[0].lineno - 1]
    body = [line.split("  # ")[0].rstrip() for line in lines[node.body[0].end_lineno : node.end_lineno]]
    return [*head, *(line for line in body if line and not line.lstrip().startswith("#"))]


def test_the_loops_of_the_sibling_scripts_differ_only_in_their_feature():
    base, sibling = loop_lines("train.py"), loop_lines("train_elastic.py")
    found = [line for line in difflib.ndiff(base, sibling) if line[0] in "+-"]
    found = [line[0] + line[2:] for line in found]
    assert sorted(found) == sorted(LOOP_DIFFERENCES.strip().splitlines()), "\n".join(found)


def test_only_one_file_touches_torchft():
    using = [path.name for path in LIBRARY.rglob("*.py") if re.search(r"(from|import) torchft", path.read_text())]
    assert using == ["membership.py"]


def test_make_finds_all_tests_that_run_alone():
    """It collects them from some folders only, which is faster."""
    folders = re.search("^ALONE := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    using = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark." + "alone" in path.read_text()]
    assert len(using) >= 3 and all(any(ROOT / folder in path.parents for folder in folders) for path in using)
