"""The part of the hub that takes models: a loopback server to which ``huggingface_hub`` uploads.

Large files come as Git LFS does it, or through Xet, which ``huggingface_hub`` prefers where ``hf_xet`` is installed:
there the token names a folder of this machine as the store, and the Rust client does everything else as ever.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from hub import Files, HubHandler, LoopbackHub

WRITER, READER = "hf_writer", "hf_reader"
OWNER = "someone"
LFS_ENDINGS = (".safetensors", ".gguf")
_ACTION = re.compile(
    r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:/(preupload|commit|xet-write-token)/main|\.git/info/lfs/objects/(batch))"
)


class ModelHub(LoopbackHub):
    """A hub on which ``OWNER`` may create repositories with the token ``WRITER``, but not with ``READER``.

    Attributes:
        store: where the chunks of files that come through Xet are stored.
        objects: large files by SHA-256.
        messages: summaries of the commits by repository, in order.
        refusals: action (``create``, ``preupload``, ``batch``, ``upload``, ``xet-write-token``, ``commit``) -> status
            and message of the refusal that it meets.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(handler=ModelHubHandler)
        self._folder = folder
        self.clear()

    def clear(self) -> None:
        """Nothing in it, and no faults."""
        self.calm()
        self.store = Path(mkdtemp(dir=self._folder))
        self.repositories.clear()
        self.private.clear()
        self.objects: dict[str, bytes] = {}
        self.messages: dict[str, list[str]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}

    def large_file(self, sha256: str, size: int) -> bytes | None:
        """A large file that was uploaded, by either way."""
        if sha256 not in self.objects and (xet_hash := dict(_shard_entries(self.store)).get(sha256)):
            self.objects[sha256] = _from_xet(self.store, xet_hash, size)
        data = self.objects.get(sha256)
        return data if data is not None and len(data) == size else None


class ModelHubHandler(HubHandler):
    """Creates repositories and takes commits; reading is ``HubHandler``'s."""

    hub: ModelHub

    def route(self, path: str, sent: bytes) -> None:
        found = _ACTION.fullmatch(path)
        if path == "/api/validate-yaml":
            self._validate_card(json.loads(sent)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(sent))
        elif path.startswith("/upload/"):  # what the batch answered is a link that needs no token
            self._take(path.removeprefix("/upload/"), sent)
        elif found:
            self._act(found[1], found[2] or found[3], sent)
        else:
            super().route(path.removeprefix("/api/models").removeprefix("/"), sent)

    def _may_write(self, action: str, owner: str) -> bool:
        """Whether the request carries a token that allows it; otherwise it has been refused."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status, message = self.hub.refusals.get(action, (0, ""))
        if not status and token not in (WRITER, READER):
            status, message = 401, "Invalid credentials in Authorization header"
        elif not status and (token == READER or owner != OWNER):
            status, message = 403, f"You don't have the rights to create a model under the namespace {owner}"
        if status:
            self.refuse(status, "", {"X-Error-Message": message})
        return not status

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not self._may_write("create", name.split("/")[0]):
            return
        found = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self.answer(found | {"error": "You already created this model repo"}, 409)
        self.hub.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        if asked.get("visibility") == "private":
            self.hub.private.add(name)
        self.answer(found)

    def _act(self, name: str, action: str, sent: bytes) -> None:
        if not self._may_write(action, name.split("/")[0]):
            return
        if name not in self.hub.repositories:
            return self.refuse(404, "RepoNotFound")
        if action == "preupload":
            files = self.hub.repositories[name]
            self.answer({"files": [_upload_mode(files, entry) for entry in json.loads(sent)["files"]]})
        elif action == "batch":
            self.answer({"objects": [self._upload_link(entry) for entry in json.loads(sent)["objects"]]})
        elif action == "xet-write-token":
            store = f"local://{self.hub.store}"
            self.answer({"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": store})
        else:
            self._commit(name, [json.loads(line) for line in sent.splitlines()])

    def _upload_link(self, entry: dict[str, Any]) -> dict[str, Any]:
        if self.hub.large_file(entry["oid"], entry["size"]) is not None:
            return entry
        return entry | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}}

    def _take(self, sha256: str, data: bytes) -> None:
        if "upload" in self.hub.refusals:
            return self.refuse(self.hub.refusals["upload"][0], "")
        if hashlib.sha256(data).hexdigest() != sha256:
            return self.refuse(400, "")
        self.hub.objects[sha256] = data
        self.answer({})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        """All of the files become visible at once, or none of them does."""
        new: dict[str, bytes] = {}
        for line in lines[1:]:
            value, data = line["value"], None
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.hub.large_file(value["oid"], value["size"])
            if data is None:
                return self.refuse(400, "", {"X-Error-Message": f"{value['path']} cannot be committed"})
            new[value["path"]] = data
        self.hub.repositories[name] = {**self.hub.repositories[name], **new}
        self.hub.messages.setdefault(name, []).append(lines[0]["value"]["summary"])
        commit = self.hub.commit(name)
        self.answer({"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _validate_card(self, text: str) -> None:
        try:
            yaml.safe_load(text.split("---")[1] if text.startswith("---") else "")
        except yaml.YAMLError as error:
            return self.answer({"errors": [{"message": str(error).splitlines()[0]}], "warnings": []}, 400)
        self.answer({"errors": [], "warnings": []})


def _upload_mode(files: Files, entry: Mapping[str, Any]) -> dict[str, Any]:
    """How a file is to be sent, and what is there already under its name."""
    is_large = entry["path"].endswith(LFS_ENDINGS)
    there = files.get(entry["path"])
    oid = there and (hashlib.sha256(there) if is_large else hashlib.sha1(b"blob %d\0" % len(there) + there)).hexdigest()
    return {
        "path": entry["path"],
        "uploadMode": "lfs" if is_large else "regular",
        "shouldIgnore": False,
        "oid": oid,
    }


def _shard_entries(folder: Path) -> Iterator[tuple[str, str]]:
    """SHA-256 and Xet hash of every file that the store in ``folder`` knows."""
    for shard in folder.glob("xet/shard-cache/*.mdb"):
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            flags, n = struct.unpack_from("<II", data, at + 32)
            verified, has_sha = bool(flags >> 31), bool(flags >> 30 & 1)
            end = at + 48 * (1 + n * (1 + verified))
            if has_sha:
                yield _hex(data[end : end + 32]), _hex(data[at : at + 32])
            at = end + 48 * has_sha


def _hex(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def _from_xet(folder: Path, xet_hash: str, size: int) -> bytes:
    from hf_xet import XetFileInfo, XetSession

    target = folder / xet_hash
    with XetSession().new_file_download_group(endpoint=f"local://{folder}") as group:
        group.start_download_file(XetFileInfo(xet_hash, size), str(target))
    return target.read_bytes()
