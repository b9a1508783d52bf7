"""The script that made the sample shards: prompts that suit the shipped model, from text that it has not seen.

    python -m batchinfer.tiny.make_sample [--out batchinfer/tiny/sample]

It takes beginnings of held-out docstrings and of the sentences in them (see corpus.py for what is held out and for the
licence), and a few hand-written ones, and writes them as two Parquet shards. Beside `prompt` the shards carry columns of
other types, so that a run on them shows that input columns come out unchanged. One Python version always gives the same rows.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.tiny.corpus import Document, documents, split

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string())),
        pa.field("created", pa.timestamp("ms", tz="UTC")),
        pa.field("words", pa.int32()),
    ]
)
SHARD_ROWS = (150, 106)
FIRST_CREATED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
HAND_WRITTEN = (
    "Return a list of",
    "Return the number of",
    "Return True if",
    "The following example shows how to",
    "This module provides",
    "This function is used to",
    "The optional argument",
    "If the file does not exist,",
    "Raise ValueError if",
    "Note that the",
    'def read_lines(path):\n    """',
    'def copy_file(source, target):\n    """Copy',
    'class Queue:\n    """',
    "import os\nimport sys\n\ndef main():\n",
    "for name in sorted(names):\n",
    "try:\n    value = int(text)\nexcept ValueError:\n",
)


def prompts() -> list[tuple[str, str]]:
    """(prompt, source), all distinct, in a fixed order that mixes sources and lengths."""
    _, held = split(documents())
    candidates = {p: d.origin for d in held for p in _beginnings(d) if p.isascii() and p not in HAND_WRITTEN}
    order = random.Random(0)
    chosen = _balanced(order.sample(list(candidates.items()), len(candidates)), sum(SHARD_ROWS) - len(HAND_WRITTEN))
    chosen += [(p, "template") for p in HAND_WRITTEN]
    order.shuffle(chosen)
    return chosen


def _beginnings(document: Document) -> Iterator[str]:
    if document.kind == "docstring":
        yield from _docstring_beginnings(document.text)
    elif document.kind == "source":
        yield from _function_beginnings(document.text)


def _docstring_beginnings(text: str) -> Iterator[str]:
    """A head with the first words below it, the first half of a sentence, and a whole paragraph to go on from."""
    head, _, body = text.partition("\n\n")
    words = body.split()
    if len(words) >= 8:
        yield f"{head}\n\n{' '.join(words[:3])}"
        yield " ".join(words[: len(words[:24]) // 2])
    paragraphs = [" ".join(p.split()) for p in body.split("\n\n")]
    yield from (p for p in paragraphs[1:2] if len(p.split()) >= 12 and re.fullmatch(r"[A-Z][^|>]*\.", p))


def _function_beginnings(source: str) -> Iterator[str]:
    """The heads of functions that have a docstring, up to its opening quotes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            yield f'def {node.name}({ast.unparse(node.args)}):\n    """'


def _balanced(candidates: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` of them, no source with more than a tenth, in their order."""
    taken: dict[str, int] = {}
    chosen: list[tuple[str, str]] = []
    for prompt, source in candidates:
        if len(chosen) < count and taken.get(source, 0) < count // 10:
            taken[source] = taken.get(source, 0) + 1
            chosen.append((prompt, source))
    return chosen


def table(rows: list[tuple[str, str]]) -> pa.Table:
    """`rows` with the columns of SCHEMA."""
    columns = {
        "id": list(range(1000, 1000 + len(rows))),
        "prompt": [prompt for prompt, _ in rows],
        "source": [source for _, source in rows],
        "created": [FIRST_CREATED + datetime.timedelta(minutes=7 * i) for i in range(len(rows))],
        "words": [len(prompt.split()) for prompt, _ in rows],
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    whole = table(prompts())
    start = 0
    for number, rows in enumerate(SHARD_ROWS):
        pq.write_table(whole.slice(start, rows), out / f"part-{number}.parquet", compression="zstd", row_group_size=64)
        start += rows
    print(f"{start} prompts in {out}")


if __name__ == "__main__":
    main()
