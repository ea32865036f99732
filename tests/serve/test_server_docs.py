"""docs/serving.md: what needs a running server is run against one, and its tables are true."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from served import ScriptedDecoder, serving

from nanokimi.serve.metrics import Metrics

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(decoders=[ScriptedDecoder(b"path")], chat=True) as server:
        yield server.url


@pytest.mark.parametrize("code", [c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if ADDRESS in c])
def test_the_examples_with_the_client_run(url: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code.replace(ADDRESS, url), "example", "exec"), {})
    assert "path" in capsys.readouterr().out


@pytest.mark.parametrize("command", re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
def test_the_examples_with_curl_run(url: str, command: str) -> None:
    done = subprocess.run(["sh", "-c", command.replace(ADDRESS, url)], capture_output=True, text=True, check=True)
    assert '"text":"path' in done.stdout


def test_every_metric_is_explained_and_every_explained_metric_exists(url: str) -> None:
    text = httpx.get(f"{url}/metrics").text
    assert set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) == set(re.findall(r"`(nanokimi_\w+)`", PAGE))
    assert Metrics().text({}).endswith("nanokimi_time_per_token_seconds_count 0\n")


def test_every_route_is_explained(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    for path in paths:
        assert f"`{path.replace('{name}', 'NAME')}`" in re.sub(r"`(GET|POST) ", "`", PAGE)
    assert OpenAI(base_url=f"{url}/v1", api_key="-").models.list().data[0].id == "debug"
