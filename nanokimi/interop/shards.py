"""The tensors of a Hugging Face folder, read one by one from its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanokimi.checkpoint import check_fits
from nanokimi.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_STORED_TYPES = ("F32", "F16", "BF16")


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read from its file when it is asked for.

    Attributes:
        files: names of the files that hold weights.

    Raises:
        UserError: no safetensors, a file is missing, truncated, or lacks what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._aliases: dict[str, str] = {}
        index = folder / INDEX
        home = _weight_map(index) if index.is_file() else {}
        self.files = sorted(set(home.values())) or [WEIGHTS]
        if not (folder / self.files[0]).is_file() and any(folder.glob("*.bin")):
            raise UserError(
                f"{folder}: its weights are pickles (*.bin), which can run code and are not read: "
                "convert them to safetensors"
            )
        self.home = {name: file for file in self.files for name in self._open(file).keys()}  # noqa: SIM118
        if lost := sorted(home.keys() - self.home.keys()):
            raise UserError(f"{folder / INDEX}: lists {lost[0]}, which no file holds: copy the folder again")

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"{path}: missing: copy the folder again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error}): copy it again") from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open(self.home[name]).get_tensor(self._aliases.get(name, name))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __len__(self) -> int:
        return len(self.home)

    def alias(self, name: str, other: str) -> None:
        """Makes ``name``, unless there is such a tensor, another name of ``other``."""
        if name not in self.home and other in self.home:
            self._aliases[name] = other
            self.home[name] = self.home[other]

    def fit(self, expected: Mapping[str, Tensor], n_layers: int) -> list[str]:
        """Checks names, shapes and types; returns notes on what is left out.

        Args:
            expected: all that the model needs, by the folder's names.

        Raises:
            UserError: they do not fit, or are quantised.
        """
        left_out = [name for name in self.home if name not in expected and _needless(name, n_layers)]
        found: dict[str, Tensor] = {}
        for name in self.home.keys() - left_out:
            part = self._open(self.home[name]).get_slice(self._aliases.get(name, name))
            if part.get_dtype() not in _STORED_TYPES:
                raise UserError(
                    f"{self.folder / self.home[name]}: {name} is of type {part.get_dtype()}: quantised weights are "
                    "not read, convert them to bf16"
                )
            if all(part.get_shape()):  # where there are no shared experts, transformers writes matrices without rows
                found[name] = torch.empty(part.get_shape(), device="meta")
        check_fits(self.folder, found, expected)
        if not left_out:
            return []
        names = ", ".join(left_out[:3]) + (" ..." if len(left_out) > 3 else "")
        return [f"left out, for the model works without (layers for further tokens, old tables): {names}"]


def _needless(name: str, n_layers: int) -> bool:
    """Tables of old folders, and the layers behind the last that predict further tokens."""
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    return name.endswith("rotary_emb.inv_freq") or (layer.isdecimal() and int(layer) >= n_layers)


def _weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name; UserError unless all of them are names of files beside the index."""
    home = read_json(index).get("weight_map")
    if not isinstance(home, dict) or not home or not all(map(_is_file_name, home.values())):
        raise UserError(f"{index}: its weight_map is no list of tensors and files: copy it again")
    return home


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError, naming the file, where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        folder = path.parent
        if folder.is_dir():
            raise UserError(f"{path}: no such file: name a folder in Hugging Face format") from None
        if folder.exists():
            raise UserError(f"{folder} is a file: name a folder in Hugging Face format") from None
        raise UserError(
            f"{folder}: no such folder: for a model of the hub, `hf download OWNER/NAME --local-dir {folder}` first"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object: copy it again")
    return content
