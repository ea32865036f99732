"""Settings on the command line: flags of the configs' fields, ``--set``, ``--config``, and mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from nanokimi.config import ModelConfig, TrainConfig, field_names, parse_value, suggest
from nanokimi.console import complain
from nanokimi.errors import UserError
from nanokimi.files import expand_home

Config = type[ModelConfig] | type[TrainConfig]
PATHS = ("FILE", "FOLDER", "CHECKPOINT", "MODEL", "PATH")  # so begins what ``--help`` calls a path


class Parser(argparse.ArgumentParser):
    """A mistake takes one line and exit code 2; dashes stand for underscores; no flag is guessed from its beginning."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        found, rest = super().parse_known_args([self._with_underscores(word) for word in words], namespace)
        for action in self._actions:
            if isinstance(value := getattr(found, action.dest, None), str):
                setattr(found, action.dest, self._checked(action, value))
            elif isinstance(value, list):
                setattr(found, action.dest, [self._checked(action, item) for item in value])
        return found, rest

    def _checked(self, action: argparse.Action, value: str) -> str:
        """A value as it was meant: UTF-8, and a path with the home for ``~``."""
        if any("\ud800" <= character <= "\udfff" for character in value):  # what Python makes of other bytes (PEP 383)
            name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
            self.error(f"{name} {value!a}: not UTF-8: check the encoding of the terminal, or rename the file")
        return expand_home(value) if str(action.metavar).startswith(PATHS) else value

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Lets ``--`` be a value, as in ``--stop=--``: before Python 3.13 it becomes an empty list."""
        if not action.option_strings or arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")
        self._check_value(action, value)
        return value

    def _with_underscores(self, word: str) -> str:
        name, equals, value = word.partition("=")
        flag = "--" + name[2:].replace("-", "_")
        known = name.startswith("--") and flag in self._option_string_actions
        return flag + equals + value if known else word

    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: {message} (--help lists what there is)")
        self.exit(2)


def add_settings(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """A flag for each field of TrainConfig in ``names``; ``--set`` and ``--config`` reach every field."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any setting, also of the model's shape"
    )
    parser.add_argument("--config", metavar="FILE.toml", help="a file of settings; flags win over it")
    groups: dict[str, Any] = {}
    for f in (f for f in fields(TrainConfig) if f.name in names):
        title, about, choices = (f.metadata[name] for name in ("group", "help", "choices"))
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {}
        if f.type == "bool" or f.name == "mixed_precision":  # the flag alone switches it on
            options = {"nargs": "?", "const": "true" if f.type == "bool" else "on"}
        if choices:
            about += " {" + ",".join(choices) + "}"
        about += f" (default: {'none' if f.default == '' else f.default})"
        metavar = "PATH" if f.metadata["is_path"] else str(f.type).upper()
        groups[title].add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=metavar, help=about, **options)


def gather_settings(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of TrainConfig and of ModelConfig that were named: in the file, over it by flags, over these by --set."""
    values: dict[Config, dict[str, Any]] = {TrainConfig: {}, ModelConfig: {}}
    if args.config:
        for name, value in _read_toml(Path(args.config)).items():
            values[_config_of(name, f"--config {args.config}")][name] = value
    for name in field_names(TrainConfig):
        if name in args:
            values[TrainConfig][name] = parse_value(TrainConfig, name, getattr(args, name))
    for assignment in args.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as FIELD=VALUE")
        cls = _config_of(name, "--set")
        values[cls][name] = parse_value(cls, name, text)
    for cls, chosen in values.items():
        paths = [name for name in field_names(cls, is_path=True) if isinstance(chosen.get(name), str)]
        chosen |= {name: expand_home(chosen[name]) for name in paths}
    return values[TrainConfig], values[ModelConfig]


def _config_of(name: str, where: str) -> Config:
    for cls in (ModelConfig, TrainConfig):
        if name in field_names(cls):
            return cls
    known = {*field_names(ModelConfig), *field_names(TrainConfig)}
    raise UserError(f"{where}: no field {name!r}{suggest(name, known)}")


def _read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file by field; its tables are only for the reader's eye."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from error
    tables = [value for value in content.values() if isinstance(value, dict)]
    settings = {name: value for name, value in content.items() if not isinstance(value, dict)}
    for table in tables:
        settings |= table
    return settings
