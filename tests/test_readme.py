"""The pages: their commands can be typed, their links and file names exist, and generated parts are up to date."""

import ast
import importlib
import re
import runpy
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser
from commands import ROOT

from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.launch.config import ForgeConfig
from forge_lib.launch.status import status_parser

PAGES = ["README.md", "README.tr.md", "CONTRIBUTING.md", "accelerate_configs/README.md", "data/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = {
    "train": "TrainConfig",
    "train_elastic": "ElasticConfig",
    "evaluate": "EvaluateConfig",
    "generate": "GenerateConfig",
    "prepare_data": "PrepareConfig",
    "benchmark": "BenchmarkConfig",
    "make_configs": "MakeConfig",
    "check_cluster": "CheckConfig",
    "report": "ReportConfig",
}
POSITIONAL = {"make_configs": "cluster", "check_cluster": "cluster", "benchmark": "what", "report": "runs"}


def commands() -> list[tuple[str, list[str]]]:
    """Returns (page, words) of each command in the bash blocks of the pages."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((page, shlex.split(line, comments=True)))
    return found


def check_script(words: list[str]) -> None:
    """Checks that a script exists, and that it accepts these flags."""
    script, flags = ROOT / words[0], words[1:]
    assert script.is_file(), words
    if script.parent.name == "scripts":
        module = importlib.import_module(f"scripts.{script.stem}")
        parse_config(getattr(module, CONFIGS[script.stem]), flags, positional=POSITIONAL.get(script.stem, ""))


def check(words: list[str]) -> bool:
    """Checks one command; returns False if it is not a program of this project or of its launchers."""
    program = words[0].split("/")[-1]
    if program in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
        check_script(words[1:])
    elif program == "accelerate" and words[1] == "launch":
        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file() or "my_" in args.config_file, words
        check_script([args.training_script, *args.training_script_args])
    elif program == "torchrun":
        check_script(words[next(i for i, word in enumerate(words) if word.endswith(".py")) :])
    elif words[:2] == ["p2p-llm-forge", "status"]:
        status_parser().parse_args(words[2:])
    elif program == "p2p-llm-forge":
        parse_config(ForgeConfig, words[1:])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all(word in targets for word in words[1:] if "=" not in word), words
    else:
        return False
    return True


def test_every_command_parses():
    checked = 0
    for page, words in commands():
        try:
            checked += check(words)
        except (UserError, SystemExit) as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error}")
    assert checked > 20


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_in_a_scripts_docstring_parses(name):
    docstring = ast.get_docstring(ast.parse((ROOT / "scripts" / f"{name}.py").read_text()))
    lines = [line.strip() for line in docstring.replace("\\\n", " ").splitlines()]
    found = [check(shlex.split(line)) for line in lines if line.startswith(("python ", "accelerate "))]
    assert found
    assert all(found)


def headings(page: str) -> list[str]:
    """Returns the level of each heading of a page, without the lines of code blocks."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    return re.findall(r"^(#+) ", text, flags=re.MULTILINE)


def test_the_turkish_readme_has_the_sections_and_the_commands_of_the_english_one():
    assert headings("README.tr.md") == headings("README.md")
    english, turkish = (
        [words for page, words in commands() if page == name] for name in ("README.md", "README.tr.md")
    )
    assert turkish == english


def test_the_turkish_comparison_has_the_sections_and_the_sources_of_the_english_one():
    assert headings("docs/comparison.tr.md") == headings("docs/comparison.md")
    english, turkish = (
        re.findall(r"\]\((https:[^)]+)\)", (ROOT / "docs" / name).read_text())
        for name in ("comparison.md", "comparison.tr.md")
    )
    assert turkish == english and len(english) > 30


def test_each_page_can_be_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
    for page in (ROOT / "docs").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 250, page


def test_the_page_of_flags_is_what_the_code_generates():
    generator = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))
    assert (ROOT / "docs" / "flags.md").read_text() == generator["make_page"](), "run `make docs`"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_file_name_of_a_page_exists(page):
    """Links to files, and names of files of this repository in code spans, such as `scripts/train.py`."""
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in link or (folder / link).exists(), link
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)`", text):  # from the root or from forge_lib/
        assert (ROOT / name).exists() or (ROOT / "forge_lib" / name).exists(), name
