"""Settings on the command line: flags of the configs' fields, ``--set``, ``--config``, and mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from nanokimi.config import ModelConfig, TrainConfig, parse_value, suggest
from nanokimi.console import complain
from nanokimi.errors import UserError

MODEL_FIELDS = {f.name for f in fields(ModelConfig)}
TRAIN_FIELDS = {f.name for f in fields(TrainConfig)}
DATA_FIELDS = {
    "preset", "dataset", "data_path", "mix", "val_path", "val_fraction", "val_tokens", "hf_repo_name", "hf_config",
    "hf_split", "text_column", "num_samples", "streaming", "shuffle_buffer", "encoding_errors", "num_workers", "seed",
}  # fmt: skip
EVAL_FIELDS = DATA_FIELDS - {"preset", "val_tokens", "shuffle_buffer", "num_workers", "seed"} | {"device"}


class Parser(argparse.ArgumentParser):
    """Mistakes take one line and exit code 2; nothing is guessed from a prefix."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: {message} (--help lists what there is)")
        self.exit(2)


def add_settings(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """A flag for each field of TrainConfig in ``names``; any other can be set, or read from a file."""
    for f in (f for f in fields(TrainConfig) if f.name in names):
        about = str(f.metadata["help"])
        choices = " {" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else ""
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if f.type == "bool" else {}
        if f.name == "mixed_precision":
            switch = {"nargs": "?", "const": "on"}
        parser.add_argument(
            *spellings(f.name), dest=f.name, default=argparse.SUPPRESS, metavar=str(f.type).upper(),
            help=f"{about}{choices} (default: {f.default if f.default != '' else 'none'})".replace("%", "%%"), **switch,
        )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of either config")
    parser.add_argument("--config", metavar="FILE.toml", help="settings from a file; flags win over it")


def spellings(name: str) -> list[str]:
    """A flag with underscores, and with dashes."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def gather_settings(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of TrainConfig and of ModelConfig that were named: in the file, over it by flags, over these by --set."""
    train_values: dict[str, Any] = {}
    model_values: dict[str, Any] = {}
    if args.config:
        read_toml(Path(args.config), train_values, model_values)
    given = {name: text for name, text in vars(args).items() if name in TRAIN_FIELDS}
    for name, text in given.items():
        train_values[name] = parse_value(TrainConfig, name, text)
    for assignment in args.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as FIELD=VALUE")
        cls, values = home_of(name, "--set", train_values, model_values)
        values[name] = parse_value(cls, name, text)
    return train_values, model_values


def home_of(
    name: str, where: str, train_values: dict[str, Any], model_values: dict[str, Any]
) -> tuple[type[ModelConfig] | type[TrainConfig], dict[str, Any]]:
    """The config that field ``name`` belongs to, and the settings gathered for it."""
    if name in MODEL_FIELDS:
        return ModelConfig, model_values
    if name in TRAIN_FIELDS:
        return TrainConfig, train_values
    raise UserError(f"{where}: no field {name!r}{suggest(name, MODEL_FIELDS | TRAIN_FIELDS)}")


def read_toml(path: Path, train_values: dict[str, Any], model_values: dict[str, Any]) -> None:
    """Adds the settings of a TOML file; tables are only for the reader's eye, fields are known by name."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from error
    tables = [content, *(value for value in content.values() if isinstance(value, dict))]
    for depth, table in enumerate(tables):
        for name, value in table.items():
            if isinstance(value, dict) and depth == 0:
                continue  # one of the tables themselves
            home_of(name, f"--config {path}", train_values, model_values)[1][name] = value
