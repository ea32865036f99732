"""``nanokimi serve``: flags and their mistakes, the address, signals and exit codes."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from stored_models import saved, stored_model

from nanokimi.cli import build_parser, main
from nanokimi.errors import UserError
from nanokimi.serve.arguments import KEY_VARIABLE, ServeOptions, options_of
from nanokimi.serve.server import address, bind


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(stored_model(), tmp_path_factory.mktemp("run") / "small.pt")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def options(*arguments: str) -> ServeOptions:
    return options_of(build_parser().parse_args(["serve", "final.pt", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "-1"], "--port"),
        (["--port", "65536"], "--port"),
        (["--port", "http"], "--port"),
        (["--slots", "0"], "--slots must be 1 or more, got 0"),
        (["--max_queue", "-1"], "--max_queue"),
        (["--max_tokens", "0"], "--max_tokens"),
        (["--max-n", "0"], "--max_n"),
        (["--max_body", "0"], "--max_body"),
        (["--max_seconds", "0"], "--max_seconds"),
        (["--max_seconds", "nan"], "--max_seconds"),
        (["--max_seconds", "inf"], "--max_seconds"),
        (["--drain_seconds", "-1"], "--drain_seconds"),
        (["--drain_seconds", "nan"], "--drain_seconds"),
        (["--host", ""], "--host"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can reach it, so it needs a key: --api_key_file"),
        (["--host", "::"], "--api_key_file"),
        (["--host", "203.0.113.7"], "--api_key_file"),
        (["--allowed_host", "http://a.example"], "--allowed_host"),
        (["--allowed_host", "a:80"], "--allowed_host"),
        (["--allowed_origin", "a.example"], "--allowed_origin"),
        (["--allowed_origin", "*"], "--allowed_origin"),
        (["--allowed_origin", "https://a.example/"], "--allowed_origin"),
        (["--api_key_file", "nowhere.txt"], "--api_key_file nowhere.txt: No such file"),
        (["--device", "tpu"], "--device tpu"),
        (["--weights", "int4"], "--weights"),
        (["--decoder", "x"], "--decoder"),
        (["--chat_template", "nowhere.jinja"], "--chat_template nowhere.jinja"),
        (["--slots", "100000000"], "--slots 100000000: their caches"),
        (["--prefill_chunk", "0"], "--prefill_chunk"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], model_file: Path
) -> None:
    try:
        code = main(["serve", str(model_file), *arguments])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert captured.out == ""


@pytest.mark.fault("A18")
def test_caches_that_do_not_fit_are_refused_before_any_is_made(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanokimi.serve.server.new_decoder", None)
    monkeypatch.setattr("nanokimi.serve.server.free_memory", lambda: 500_000)
    assert main(["serve", str(model_file), "--port", "0", "--slots", "32"]) == 2
    assert "--slots 32: their caches take " in capsys.readouterr().err


def test_the_model_works_in_one_thread_from_the_start(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def where(*_: object, **__: object) -> None:
        raise UserError(threading.current_thread().name)

    monkeypatch.setattr("nanokimi.serve.server.load", where)
    assert main(["serve", str(model_file), "--port", "0"]) == 2
    assert capsys.readouterr().err == "nanokimi: engine\n"


@pytest.mark.fault(82)
def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nowhere.pt"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "two words", "naïve", "a\nb"])
def test_a_key_that_no_client_could_send_is_refused(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(content, encoding="utf-8")
    assert main(["serve", "final.pt", "--api_key_file", str(tmp_path / "key")]) == 2
    assert "--api_key_file" in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, content)
    assert main(["serve", "final.pt"]) == 2
    line = capsys.readouterr().err
    assert f"${KEY_VARIABLE}" in line
    assert not content or content not in line


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options().rules.api_key is None
    monkeypatch.setenv(KEY_VARIABLE, "from-the-environment")
    assert options("--host", "0.0.0.0").rules.api_key == "from-the-environment"
    (tmp_path / "key").write_text("from-the-file\n", encoding="utf-8")
    assert options("--api-key-file", str(tmp_path / "key")).rules.api_key == "from-the-file"


def test_the_model_goes_by_the_name_of_its_file_unless_it_is_given_one() -> None:
    assert options().served_name == "final.pt"
    assert options("--model_name", "mine/small").served_name == "mine/small"


def test_names_and_origins_are_compared_in_lower_case() -> None:
    rules = options("--allowed_host", "Model.Example", "--allowed_origin", "https://Friend.Example").rules
    assert rules.host_is_ours("model.example")
    assert rules.origin_is_ours("https://friend.example", "localhost")


def test_a_taken_port_is_one_line_and_a_failure(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(model_file), "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"nanokimi: --port {port} of 127.0.0.1 is taken: choose another, or 0 for any free one"


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_that_this_machine_does_not_have_is_a_mistake(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "key")
    assert main(["serve", "final.pt", "--host", host]) == 2
    assert f"--host {host}: " in capsys.readouterr().err


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as plain:
            plain.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_an_address_of_the_newer_kind_is_written_in_brackets() -> None:
    with bind("::1", 0, 1.0) as listener:
        assert re.fullmatch(r"http://\[::1\]:\d+", address(listener))


def test_a_client_that_never_reads_loses_its_connection_in_the_end() -> None:
    with bind("127.0.0.1", 0, 5.0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_the_command_names_it(missing: str, model_file: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from nanokimi.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "serve", str(model_file)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"nanokimi: nanokimi serve needs {missing}: pip install 'nanokimi[serve]'\n"


@pytest.mark.fault(98)
def test_the_exit_codes_of_signals_and_the_address_that_is_printed(model_file: Path) -> None:
    code = "import sys; from nanokimi.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(model_file), "--port", "0"]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for server, ending in zip(servers, (signal.SIGTERM, signal.SIGINT), strict=True):
        assert server.stdout is not None
        found = re.fullmatch(r"serving small\.pt at (http://127\.0\.0\.1:\d+)\n", server.stdout.readline())
        assert found is not None
        answer = httpx.post(f"{found[1]}/v1/completions", json={"prompt": "a", "max_tokens": 3, "temperature": 0})
        assert answer.json()["usage"]["completion_tokens"] <= 3
        server.send_signal(ending)
    for server, ending in zip(servers, (signal.SIGTERM, signal.SIGINT), strict=True):
        out, err = server.communicate(timeout=60)
        assert server.returncode == 128 + ending, err
        assert out == ""
        slots, end = err.splitlines()
        assert re.fullmatch(r"16 slots of 128 tokens, 0\.0\d+ MB each", slots)
        assert end == "ending: 0 sequences are finished first; a second signal ends at once"
