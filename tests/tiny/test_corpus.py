"""What is taken from the standard library, and what is held back."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.tiny import corpus

SOURCE = '''\
# First line of a comment that is long enough to be prose and stands alone at the top of the file,
# which goes on for a second line so that nobody can doubt that it was meant to be read as text,
# and for a third.
class Box:
    """Hold one thing, and give it back when it is asked for."""

    def get(self, default=None):
        """Return the thing, or the default when there is none."""
        return default
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def texts(kind: str) -> list[str]:
    return [d.text for d in corpus.documents() if d.kind == kind]


def test_a_file_gives_source_docstrings_and_comments(library: Path) -> None:
    (library / "box.py").write_text(SOURCE)
    assert texts("source") == [SOURCE]
    assert texts("docstring") == [
        "class box.Box\n\nHold one thing, and give it back when it is asked for.\n",
        "box.Box.get(self, default=None)\n\nReturn the thing, or the default when there is none.\n",
    ]
    assert texts("chat") == [
        "user: What is class box.Box?\n\nassistant: Hold one thing, and give it back when it is asked for.\n"
    ]
    assert [t.splitlines()[2] for t in texts("comment")] == ["and for a third."]


@pytest.mark.parametrize(
    "name", ["test/box.py", "site-packages/box.py", "encodings/box.py", "a/tests/box.py", "_sysconfigdata_x.py"]
)
def test_tests_packages_and_tables_are_left_out(library: Path, name: str) -> None:
    (library / name).parent.mkdir(parents=True, exist_ok=True)
    (library / name).write_text(SOURCE)
    assert corpus.documents() == []


def test_data_in_the_form_of_code_is_left_out(library: Path) -> None:
    (library / "numbers.py").write_text("table = {" + ", ".join(f"0x{i:x}: {i}" for i in range(200)) + "}\n")
    assert corpus.documents() == []


def test_equal_texts_are_taken_once(library: Path) -> None:
    (library / "a.py").write_text(SOURCE)
    (library / "b.py").write_text(SOURCE)
    assert len(texts("source")) == 1


def test_a_module_is_held_back_whole() -> None:
    learnt, held = corpus.split(corpus.documents())
    assert not {d.origin for d in learnt} & {d.origin for d in held}
    assert 0.01 < sum(len(d.text) for d in held) / sum(len(d.text) for d in learnt + held) < 0.1
