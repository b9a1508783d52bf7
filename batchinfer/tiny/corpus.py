"""The text that the shipped model learnt: Python's own standard library, cut into documents.

This module owns what is taken, what is left out, and which part is held back: whole files are held back, so that no held-out
docstring also stands in a source file that was learnt. It needs nothing but the standard library, and it reads only the files
of the interpreter that runs it; nothing is downloaded.

The sources are copyright of the Python Software Foundation and its contributors, under the PSF License Version 2 (a few
files come with their own, compatible notices); see https://docs.python.org/3/license.html.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "lib2to3",
    "_bundled",
    "__pycache__",
    "pydoc_data",
    "lib-dynload",
    "__phello__",
    "phello",
}
SKIPPED_FILES = re.compile(r"_sysconfigdata|entities\.py$|keysyms|stringprep")
HELD_BACK_SHARE = 0.03


@dataclass(frozen=True)
class Document:
    """A text that stands alone. `kind`: source, docstring, comment, chat or topic. `origin`: dotted name of its module."""

    kind: str
    origin: str
    text: str

    @property
    def held_back(self) -> bool:
        """Whether it serves the held-out loss and the sample prompts; decided by the origin's name alone."""
        digest = hashlib.blake2b(self.origin.encode(), digest_size=4).digest()
        return int.from_bytes(digest) < HELD_BACK_SHARE * 2**32


def documents() -> list[Document]:
    """Every document once, in a fixed order for one Python version."""
    seen: set[str] = set()
    return [d for d in _all_documents(Path(sysconfig.get_path("stdlib"))) if not _repeated(d, seen)]


def _repeated(document: Document, seen: set[str]) -> bool:
    key = "".join(document.text.split())
    repeated = key in seen
    seen.add(key)
    return repeated


def _all_documents(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not SKIPPED_FILES.search(path.name):
            yield from _file_documents(path, ".".join(parts).removesuffix(".py").removesuffix(".__init__"))
    topics = root / "pydoc_data" / "topics.py"
    if topics.exists():
        yield from _topics(topics)


def _file_documents(path: Path, module: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):  # test fixtures of other tools live in odd places
        return
    if len(text) < 200 or _is_table(text):
        return
    yield Document("source", module, text.strip() + "\n")
    for kind, body in (*_docstrings(tree, module), *_comments(text)):
        yield Document(kind, module, body)


def _is_table(text: str) -> bool:
    """Whether a file is data in the form of code: few letters among what is not white space."""
    visible = "".join(text.split())
    return sum(c.isalpha() for c in visible) < 0.6 * len(visible)


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Each docstring below the head it belongs to; every fourth once more as a question and its answer."""
    for number, (head, text) in enumerate(_documented(tree, module)):
        yield "docstring", f"{head}\n\n{text}\n"
        if number % 4 == 0:
            yield "chat", f"user: What is {head}?\n\nassistant: {text}\n"


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text and len(text) >= 30:
        yield _head(node, name), text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")


def _head(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return f"class {name}" if isinstance(node, ast.ClassDef) else f"module {name}"


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """Blocks of whole-line comments that are long enough to be prose."""
    for block in re.findall(r"(?:^[ \t]*#.*\n){3,}", text, flags=re.MULTILINE):
        lines = [re.sub(r"^[ \t]*#+ ?", "", line).rstrip() for line in block.splitlines()]
        prose = "\n".join(lines).strip()
        if len(prose) >= 150 and not _is_table(prose):
            yield "comment", prose + "\n"


def _topics(path: Path) -> Iterator[Document]:
    """The language reference as `help()` knows it: one assignment of a dictionary of texts."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            for name, text in ast.literal_eval(node.value).items():
                yield Document("topic", f"topics.{name}", text.strip() + "\n")


def split(all_documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(to learn from, held back)."""
    learnt: list[Document] = []
    held: list[Document] = []
    for document in all_documents:
        (held if document.held_back else learnt).append(document)
    return learnt, held
