"""guidellm and aiperf against ``nanokimi serve`` with a random ``tiny``: how many of their requests failed.

    python -m benchmarks.serve_clients --output benchmarks/results/serve-clients.json

Each client is installed by pip into an environment of its own under ``--environments``, unless it is there already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench.results import about
from benchmarks.engines import NANOKIMI
from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import train_bpe
from nanokimi.interop.hf_writer import write_folder
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

TEXT = "the cat sat on the mat while the dog ran over the log and nobody saw what it was. " * 50
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PROMPT, OUTPUT, STREAMS = 60, 20, 4
ROUTES = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def write_model(folder: Path) -> None:
    """A ``tiny`` that has learned nothing, with a tokenizer that other programs can open."""
    tokenizer = train_bpe([TEXT], 300)
    model = Transformer(ModelConfig.preset("tiny", vocab_size=tokenizer.vocab_size))
    folder.mkdir()
    write_folder(folder, StoredModel(model.config, model.state_dict(), tokenizer))


@contextmanager
def server(model: Path, template: Path) -> Iterator[str]:
    """The address of a server that ends with the block."""
    flags = ["--port", "0", "--chat_template", str(template)]
    command = [*NANOKIMI, "serve", str(model), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(60)


def installed(client: str, environments: Path) -> Path:
    """The program of ``client``."""
    folder = environments / client
    if not (folder / "bin" / client).exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", client], check=True)
    return folder / "bin" / client


def version_of(client: Path) -> str:
    """Of the package that a program came with."""
    code = f"from importlib.metadata import version; print(version({client.name!r}))"
    return subprocess.run([client.parent / "python", "-c", code], capture_output=True, text=True).stdout.strip()


def run_guidellm(program: Path, address: str, model: Path, route: str, requests: int, folder: Path) -> dict[str, int]:
    """What guidellm counts."""
    report = folder / f"guidellm-{route}.json"
    command = [
        *(str(program), "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={address},model={model.name},request_format={ROUTES[route]}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={requests}"),
        *("--tokenizer", f"kind=hf_auto,model={model}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
        *("--output", f"kind=json,path={report}"),
    ]
    subprocess.run(command, check=True, cwd=folder)
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    return {"completed": totals["successful"], "failed": totals["errored"] + totals["incomplete"]}


def run_aiperf(program: Path, address: str, model: Path, route: str, requests: int, folder: Path) -> dict[str, int]:
    """What aiperf counts."""
    reports = folder / f"aiperf-{route}"
    command = [
        *(str(program), "profile", "--ui", "none", "--streaming", "--output-artifact-dir", str(reports)),
        *("--model", model.name, "--url", address, "--endpoint-type", route, "--tokenizer", str(model)),
        *("--synthetic-input-tokens-mean", f"{PROMPT}", "--output-tokens-mean", f"{OUTPUT}"),
        *("--request-count", f"{requests}", "--concurrency", f"{STREAMS}", "--extra-inputs", "ignore_eos:true"),
    ]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((reports / "profile_export_aiperf.json").read_text())
    failed = (report.get("error_request_count") or {"avg": 0})["avg"]
    return {"completed": int(report["request_count"]["avg"]), "failed": int(failed)}


CLIENTS = {"guidellm": run_guidellm, "aiperf": run_aiperf}


def main() -> int:
    """Runs both clients on both routes; 1 if a request failed or is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--environments", type=Path, help="where the clients are installed (default: a new folder)")
    parser.add_argument("--output", type=Path, default=Path("serve-clients.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, template = folder / "tiny", folder / "turns.jinja"
        write_model(model)
        template.write_text(TURNS)
        rows: list[dict[str, Any]] = []
        with server(model, template) as address:
            for client, run in CLIENTS.items():
                program = installed(client, (args.environments or folder / "environments").resolve())
                for route in ROUTES:
                    counts = run(program, address, model, route, args.requests, folder)
                    rows.append({"client": client, "version": version_of(program), "route": ROUTES[route], **counts})
                    print(rows[-1], flush=True)
    args.output.write_text(json.dumps({**about(), "requests": args.requests, "runs": rows}, indent=1))
    return int(any(row["failed"] or row["completed"] != args.requests for row in rows))


if __name__ == "__main__":
    sys.exit(main())
