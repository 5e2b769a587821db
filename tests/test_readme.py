"""The README's commands are ones that a user can type."""

import ast
import dataclasses
import importlib
import re
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser
from commands import ROOT

from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.launch.config import ForgeConfig

PAGES = ["README.md", "README.tr.md", "CONTRIBUTING.md", "accelerate_configs/README.md", "data/README.md"]
CONFIGS = {
    "train": "TrainConfig",
    "evaluate": "EvaluateConfig",
    "generate": "GenerateConfig",
    "prepare_data": "PrepareConfig",
    "benchmark": "BenchmarkConfig",
    "make_configs": "MakeConfig",
    "check_cluster": "CheckConfig",
}
POSITIONAL = {"make_configs": "cluster", "check_cluster": "cluster"}


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command in the bash blocks of the pages."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((page, shlex.split(line, comments=True)))
    return found


def check_script(words: list[str]) -> None:
    """A script of ours, with its flags."""
    script, flags = ROOT / words[0], words[1:]
    assert script.is_file(), words
    if script.parent.name == "scripts":
        module = importlib.import_module(f"scripts.{script.stem}")
        parse_config(getattr(module, CONFIGS[script.stem]), flags, positional=POSITIONAL.get(script.stem, ""))


def check(words: list[str]) -> bool:
    """Checks one command; False where it is not one of ours."""
    program = words[0].split("/")[-1]
    if program in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
        check_script(words[1:])
    elif program == "accelerate" and words[1] == "launch":
        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file() or "my_" in args.config_file, words
        check_script([args.training_script, *args.training_script_args])
    elif program == "torchrun":
        check_script(words[next(i for i, word in enumerate(words) if word.endswith(".py")) :])
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


def test_the_readme_has_every_flag_of_training_and_topology():
    text = (ROOT / "README.md").read_text()
    for field in dataclasses.fields(ForgeConfig):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"^\|.*`{flag}[ `].*\|", text, flags=re.MULTILINE), f"{flag} is not in the README's tables"


def test_the_file_tree_of_the_readme_is_the_real_one():
    text = (ROOT / "README.md").read_text()
    for folder in ("forge_lib", "scripts", "accelerate_configs"):
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".yaml", ".ipynb") and path.name != "__init__.py":
                assert path.name in text, f"{folder}/{path.name} is not in the README"
