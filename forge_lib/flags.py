"""The command line and `--config` files: read into the dataclasses of forge_lib/config.py."""

import argparse
import copy
import difflib
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from forge_lib.config import LaunchConfig, flag_name
from forge_lib.errors import UserError

ConfigT = TypeVar("ConfigT")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints one line per flag: its name with dashes, the unit of its value, what it means, its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=max(119, shutil.get_terminal_size().columns - 2))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1]
        return name if action.nargs in (0, "?") else f"{name} {action.metavar or action.dest.upper()}"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} [required]"
        if action.default is False or action.default in (None, "", [], argparse.SUPPRESS):
            return action.help or ""
        return f"{action.help} [%(default)s]"


def _number_or_word(words: dict[str, int]) -> Callable[[str], int]:
    """Returns the function with which argparse reads a whole number, or one of the words."""

    def read(text: str) -> int:
        try:
            return words[text] if text in words else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"found {text!r}, expected a whole number or {', '.join(words)}"
            ) from None

    return read


class _Parser(HfArgumentParser):
    """HfArgumentParser that raises UserError instead of exiting, and leaves ranges to the dataclasses."""

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        field = copy.copy(field)
        words = field.metadata.get("words")
        field.metadata = {key: value for key, value in field.metadata.items() if key not in ("limits", "words")}
        HfArgumentParser._parse_dataclass_field(parser, field)
        if words:
            parser._actions[-1].type = _number_or_word(words)

    def error(self, message: str):
        raise UserError(re.sub(r"--\w+/(--[\w-]+)", r"\1", message))


def groups_of(config_class: type) -> list[type]:
    """Returns the groups of flags that a configuration inherits, in the order of `--help`."""
    return [base for base in reversed(config_class.__mro__) if "_argument_group_name" in vars(base)]


def parse_config(
    config_class: type[ConfigT], argv: list[str], description: str = "", prog: str | None = None, positional: str = ""
) -> ConfigT:
    """Parses the flags in `argv`, and the YAML file that `--config` names there, into a `config_class`.

    Args:
        config_class: a dataclass that inherits groups of flags.
        argv: the command line without the program.
        description: is printed above the flags by `--help`.
        prog: the program's name, if it is not the script's.
        positional: the field whose value, or values if it is a list, may be given first, without its flag.

    Raises:
        UserError: an unknown flag or key (with the closest known one), a missing or malformed value.
    """
    groups = groups_of(config_class)
    parser = _Parser(
        groups,
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        usage=f"%(prog)s {f'{positional.upper()} ' if positional else ''}[--config FILE] [flags]",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with defaults for these flags")
    known = {field.name: field.type for group in groups for field in fields(group)}
    if positional and argv and not argv[0].startswith("-"):
        argv = [flag_name(positional), *argv]

    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    found, argv = config_parser.parse_known_args(argv)
    defaults = _read_yaml(Path(found.config), known) if found.config else []
    _check_flags_are_known(argv, parser._option_string_actions, known)
    namespace, unknown = parser.parse_known_args(defaults + argv)
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}: every value needs its flag before it; --help lists them")
    values = vars(namespace)
    values.pop("config")
    return config_class(**values)


def _check_flags_are_known(argv: list[str], flags: Collection[str], known: Collection[str]) -> None:
    launch_flags = {field.name for field in fields(LaunchConfig)}
    for before, word in zip(["", *argv], argv, strict=False):
        name = word.split("=")[0]
        if not name.startswith("--") or name in flags:
            continue
        if name.lstrip("-").replace("-", "_") in launch_flags:
            raise UserError(f"{name} is a flag of p2p-llm-forge; here the accelerate YAML gives the topology")
        value = f"; or, if it is the value of {before}: {before}={word}" if before in flags else ""
        raise UserError(f"unknown flag {name}{_did_you_mean(name, known)}; --help lists all flags{value}")


def _read_yaml(path: Path, known: dict[str, Any]) -> list[str]:
    """Returns the keys of a YAML file as flags, so that both are parsed and checked in the same way.

    The values are taken as they are written: YAML would read `no` as False, and 3:1 as 181.

    Args:
        path: the file.
        known: the names of the flags, and their types.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        values, written = yaml.safe_load(text) or {}, yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines of `key: value`, found a {type(values).__name__}")
    flags = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{_did_you_mean(str(key), known)}")
        as_written = written.get(key, value)  # a key of a merged mapping (<<) is only in `values`
        if isinstance(value, list):
            flags += [flag_name(name), *map(str, as_written)]
        elif value is not None:
            flags.append(f"{flag_name(name)}={value if known[name] is bool else as_written}")
    return flags


def _did_you_mean(word: str, known: Collection[str]) -> str:
    name = word.lstrip("-").replace("-", "_")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {flag_name(close[0])}?" if close else ""


def to_flags(config: Any, config_class: type) -> list[str]:
    """Returns the flags from which `parse_config` makes a `config_class` with the values that `config` has."""
    values = {field.name: getattr(config, field.name) for field in fields(config_class)}
    defaults = {field.name: field.default for field in fields(config_class)}
    return [f"{flag_name(name)}={value}" for name, value in values.items() if value != defaults[name]]
