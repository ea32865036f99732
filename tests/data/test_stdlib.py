from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nanokimi.data.prepare import prepare_stdlib
from nanokimi.errors import RunError, UserError

FILES = {
    "a.py": b"import b\n\n\n",
    "package/b.py": b"\xef\xbb\xbfx = 'caf\xc3\xa9'\r\n",
    "package/empty.py": b"\n",
    "package/latin.py": b"x = '\xe9'\n",
    "package/marker.py": b"text = '''\n<|endoftext|>\n'''\n",
    "notes.txt": b"not a source\n",
    "test/t.py": b"a test\n",
    "package/tests/t.py": b"a test\n",
    "site-packages/p.py": b"a package\n",
    "dist-packages/p.py": b"a package\n",
    "pydoc_data/topics.py": b"the topics once more\n",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library on a Python without the language reference."""
    for name, data in FILES.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    return tmp_path / "lib"


def test_sources_become_documents_and_tests_and_packages_stay_out(library: Path, tmp_path: Path) -> None:
    output = tmp_path / "data" / "train.txt"
    summary = prepare_stdlib(output, library=library)
    assert output.read_bytes().decode() == "import b\n<|endoftext|>\nx = 'café'\n"
    assert "2 source files" in summary
    assert "left out 2 " in summary


def test_topics_of_the_language_reference_are_documents(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Topics:
        topics = {"while": "The while statement\n\n", "assert": "The assert statement"}  # noqa: RUF012

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", Topics)  # type: ignore[arg-type]
    output = library / "out.txt"
    prepare_stdlib(output, library=library)
    parts = output.read_text().split("<|endoftext|>\n")
    assert parts[-2:] == ["The assert statement\n", "The while statement\n"]


def test_a_folder_without_sources_is_an_error_and_the_old_text_stays(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no Python sources"):
        prepare_stdlib(tmp_path / "out.txt", library=tmp_path)
    assert (tmp_path / "out.txt").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_named(library: Path) -> None:
    with pytest.raises(UserError, match=r"--output .* is a directory"):
        prepare_stdlib(library, library=library)
    with pytest.raises(RunError, match=r"--output .* cannot be written"):
        prepare_stdlib(library / "a.py" / "out.txt", library=library)


@pytest.mark.slow
def test_the_library_of_this_machine_is_a_text_of_many_documents(tmp_path: Path) -> None:
    prepare_stdlib(tmp_path / "train.txt")
    documents = (tmp_path / "train.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    assert len(documents) > 100
    assert any("class JSONDecoder" in document for document in documents)
