"""Odd inputs through the real command line: right rows in, right rows out, statistics that add up, and transformers' text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import batchinfer as package
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from tests.model.oracle import widen
from tests.run.jobs import batchinfer, completions, texts

MODEL = Path(package.__file__).parent / "tiny" / "model"
QUICK = ["hw=cpu", "hw.cpus_per_gpu=1", "launcher=inline", "input=parquet", "sampling.max_tokens=6"]
MESSAGE = pa.struct(
    [("role", pa.string()), ("content", pa.string()), ("name", pa.string()), ("tool_calls", pa.list_(pa.string()))]
)


class Oracle:
    """Greedy completions by transformers, in float64."""

    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        self.model = widen(transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64))

    def text(self, token_ids: list[int], max_tokens: int) -> str:
        with torch.inference_mode():
            answer = self.model.generate(torch.tensor([token_ids]), max_new_tokens=max_tokens, do_sample=False)[
                0, len(token_ids) :
            ]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def complete(self, prompt: str, max_tokens: int = 6) -> str:
        return self.text(self.tokenizer(prompt)["input_ids"] or [self.tokenizer.bos_token_id], max_tokens)

    def answer(self, messages: list[dict[str, Any]], max_tokens: int = 6) -> str:
        chat = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.text(self.tokenizer(chat, add_special_tokens=False)["input_ids"], max_tokens)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def run(
    folder: Path, tables: pa.Table | dict[str, pa.Table], *request: object, name: str = "run", **write: Any
) -> list[dict[str, Any]]:
    """The rows of one job over these shards, in input order, after `verify` and the sums of the statistics agree with them."""
    inputs = folder / f"{name} in"
    inputs.mkdir()
    for file, table in (tables if isinstance(tables, dict) else {"in.parquet": tables}).items():
        pq.write_table(table, inputs / file, **write)
    run_dir = folder / name
    done = batchinfer(*QUICK, f"input.paths=['{inputs}']", f"output.dir={run_dir}", *request)
    assert done.returncode == 0, done.stdout + done.stderr
    return checked(run_dir)


def checked(run_dir: Path) -> list[dict[str, Any]]:
    assert verify(RunDir(run_dir)) == []
    rows = completions(run_dir).to_pylist() if list((run_dir / "completions").glob("*.parquet")) else []
    rows = [{key.removeprefix("out_"): value for key, value in row.items()} for row in rows]
    stats = [pq.read_table(path) for path in sorted((run_dir / "stats").glob("*.parquet"))]
    for column, of_rows in (("prefill_tokens", "num_prompt_tokens"), ("decode_tokens", "num_completion_tokens")):
        assert sum(sum(table[column].to_pylist()) for table in stats) == sum(row[of_rows] for row in rows)
    assert len({(row["shard"], row["row"]) for row in rows}) == len(rows)
    for row in rows:
        assert (row["error"] is None) == (row["finish_reason"] != "error") == (row["completion"] is not None)
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["complete"] and summary["rows"] == summary["rows_total"] == len(rows)
    return sorted(rows, key=lambda row: (row["shard"], row["row"]))


def errors(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["error"] for row in rows]


CHATS: list[list[dict[str, Any]] | None] = [
    [{"role": "user", "content": "Sort a list"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "naïve 雪"},
        {"role": "assistant", "content": "yes"},
    ],
    [{"role": "user", "content": "call", "name": "ann"}, {"role": "assistant", "content": None, "tool_calls": ["f(x)"]}],
    [{"role": "user", "content": None}],
    [],
    None,
    [{"role": None, "content": "x"}],
    [{"role": "user", "content": ""}],
]


@pytest.mark.parametrize("form", ["list", "large_list", "json"])
def test_chats(tmp_path: Path, oracle: Oracle, form: str) -> None:
    values = [json.dumps(chat) for chat in CHATS] if form == "json" else CHATS
    kind = {"list": pa.list_(MESSAGE), "large_list": pa.large_list(MESSAGE), "json": pa.large_string()}[form]
    rows = run(
        tmp_path,
        pa.table({"chat": pa.array(values, kind)}),
        "input.messages_column=chat",
        "input.system_prompt=Be kind.",
        "model.dtype=float64",
    )
    assert errors(rows) == [None, None, None, "bad_messages", "bad_messages", "null_prompt", "bad_messages", None]
    system = {"role": "system", "content": "Be kind."}
    assert rows[0]["completion"] == oracle.answer([system, *CHATS[0]])
    assert rows[1]["completion"] == oracle.answer(CHATS[1])
    assert rows[7]["completion"] == oracle.answer([system, *CHATS[7]])


def test_templates_and_text_of_every_type(tmp_path: Path, oracle: Oracle) -> None:
    words = ["Return the ", None, "", "naïve 雪🎉", "def f(x):\n"]
    table = pa.table(
        {
            "a": pa.array(words, pa.string()),
            "b": pa.array(words, pa.large_string()),
            "c": pa.array(words, pa.string_view()),
            "d": pa.array(words, pa.string()).dictionary_encode(),
            "nested": pa.array([{"x": w, "y": [w]} for w in words]),
        }
    )
    template = "'{% if a is none %}nothing{% else %}{{ a }}{% endif %}|{{ b }}|{{ nested.y[0] }}|{{ c.upper() }}'"
    rows = run(tmp_path, table, f'input.prompt_template="{template[1:-1]}"', "model.dtype=float64", name="template")
    assert errors(rows) == [None, "template_error", None, None, None]
    assert rows[3]["completion"] == oracle.complete("naïve 雪🎉|naïve 雪🎉|naïve 雪🎉|NAÏVE 雪🎉")
    expected = [None if word is None else oracle.complete(word) for word in words]
    for column in "c":
        rows = run(
            tmp_path, table, f"input.prompt_column={column}", "model.dtype=float64", "output.keep_columns=none", name=column
        )
        assert [row["completion"] for row in rows] == expected
        assert errors(rows) == [None, "null_prompt", None, None, None]
        assert "nested" not in rows[0]


JSON_SAMPLING: list[tuple[str | None, str | None]] = [
    (None, None),
    ("null", None),
    ("{}", None),
    (
        json.dumps({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "seed": 7, "max_tokens": 4, "ignore_eos": True}),
        None,
    ),
    ('{"stop": ["g"], "max_tokens": 9}', None),
    ('{"stop": ["zzz", "\\n"], "stop_token_ids": [5, 100000], "min_tokens": 2}', None),
    ('{"max_tokens": 1000000000, "ignore_eos": true}', None),
    ('{"max_tokens": 3.0, "temperature": 1, "ignore_eos": true}', None),
    ('{"max_token": 3}', "max_token"),
    ('{"temperature": "hot"}', "sampling.temperature=hot"),
    ('{"temperature": NaN}', "sampling.temperature=nan"),
    ('{"temperature": -1}', "sampling.temperature=-1"),
    ('{"top_p": 1e999}', "sampling.top_p=inf"),
    ('{"max_tokens": 0}', "sampling.max_tokens=0"),
    ('{"max_tokens": 2.5}', "sampling.max_tokens=2.5"),
    ('{"max_tokens": true}', "sampling.max_tokens=true"),
    ('{"min_tokens": 9, "max_tokens": 3}', "sampling.min_tokens=9"),
    ('{"stop": [""]}', "empty"),
    ('{"stop": "g"}', None),
    ('{"stop": 3}', "sampling.stop=3"),
    ('{"seed": 123456789012345678901234567890}', None),
    ('{"n": 0}', "sampling.n=0"),
    ('{"logprobs": 1}', "sampling.logprobs=1"),
    ("[1]", "object"),
    ("{", "JSON"),
    ("", "JSON"),
]


LONG = " ".join(f"word{k}" for k in range(40))


def test_sampling_of_the_row_as_json(tmp_path: Path, oracle: Oracle) -> None:
    overrides = [override for override, _ in JSON_SAMPLING]
    table = pa.table({"prompt": ["Return the "] * len(overrides) + [LONG], "how": pa.array([*overrides, None], pa.string())})
    rows = run(
        tmp_path,
        table,
        "input.prompt_column=prompt",
        "input.sampling_column=how",
        "model.max_model_len=48",
        "input.too_long=truncate_left",
        "model.dtype=float64",
    )
    for row, (override, complaint) in zip(rows[:-1], JSON_SAMPLING, strict=True):
        assert row["error"] == ("bad_sampling" if complaint else None), (override, row)
        assert complaint is None or complaint in row["error_message"], row["error_message"]
    plain = oracle.complete("Return the ")
    assert [row["completion"] for row in rows[:3]] == [plain] * 3
    assert rows[3]["num_completion_tokens"] == 4 and rows[7]["num_completion_tokens"] == 3
    longer = oracle.complete("Return the ", 9)
    assert "g" in longer and rows[4]["completion"] == longer[: longer.index("g")] and rows[4]["finish_reason"] == "stop"
    assert rows[6]["num_completion_tokens"] + rows[6]["num_prompt_tokens"] == 48 and rows[6]["finish_reason"] == "length"
    assert (rows[-1]["num_prompt_tokens"], rows[-1]["num_completion_tokens"]) == (47, 1)
    assert rows[-1]["completion"] == oracle.text(oracle.tokenizer(LONG)["input_ids"][-47:], 1)


def test_sampling_of_the_row_as_struct(tmp_path: Path, oracle: Oracle) -> None:
    kind = pa.struct(
        [("temperature", pa.float32()), ("max_tokens", pa.float64()), ("stop", pa.list_(pa.string())), ("ignore_eos", pa.bool_())]
    )
    values = [
        None,
        {"temperature": None, "max_tokens": 3.0, "stop": None, "ignore_eos": True},
        {"temperature": 0.5, "max_tokens": None, "stop": [], "ignore_eos": None},
        {"temperature": float("nan"), "max_tokens": None, "stop": None, "ignore_eos": None},
        {"temperature": None, "max_tokens": float("inf"), "stop": None, "ignore_eos": None},
        {"temperature": None, "max_tokens": None, "stop": [None], "ignore_eos": None},
    ]
    table = pa.table({"prompt": ["Return the "] * len(values) + [LONG], "how": pa.array([*values, None], kind)})
    rows = run(
        tmp_path,
        table,
        "input.prompt_column=prompt",
        "input.sampling_column=how",
        "output.token_ids=true",
        "model.max_model_len=48",
        "input.too_long=truncate_right",
        "model.dtype=float64",
    )
    assert errors(rows) == [None, None, None, "bad_sampling", "bad_sampling", "bad_sampling", None]
    assert (rows[-1]["num_prompt_tokens"], rows[-1]["num_completion_tokens"]) == (47, 1)
    assert rows[-1]["completion"] == oracle.text(oracle.tokenizer(LONG)["input_ids"][:47], 1)
    assert rows[1]["num_completion_tokens"] == 3
    assert [row["token_ids"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert all(len(row["token_ids"]) == row["num_completion_tokens"] for row in rows[:3])


def test_many_tiny_shards_of_one_kind_written_by_many_hands(tmp_path: Path) -> None:
    """Columns in another order, other metadata, other names of list items, required in one file and null in another."""
    colours = pa.array(["red", "green"]).dictionary_encode()
    tables = {}
    for k in range(120):
        required = k % 3 == 0
        columns = {
            "prompt": (pa.array([f"def f{k}("]), pa.field("prompt", pa.string(), metadata={"hand": str(k)})),
            "note": (pa.array([str(k) if required else None]), pa.field("note", pa.string(), nullable=not required)),
            "tags": (pa.array([[k, None]]), pa.field("tags", pa.list_(pa.field("item" if k % 2 else "array", pa.int64())))),
            "nested": (pa.array([{"colour": colours[k % 2]}], pa.struct([("colour", colours.type)])), None),
            "shard": (pa.array([k]), None),
        }
        names = sorted(columns, reverse=k % 2 == 1)
        fields = [columns[name][1] or pa.field(name, columns[name][0].type) for name in names]
        tables[f"{k:03d}.parquet"] = pa.Table.from_arrays(
            [columns[name][0] for name in names], schema=pa.schema(fields, {"k": str(k)})
        )
    rows = run(
        tmp_path,
        tables,
        "input.prompt_column=prompt",
        "output.prefix=out_",
        "output.compression=none",
        "output.token_ids=true",
        "output.keep_columns=[tags,note,nested,shard]",
        "sampling.max_tokens=2",
        use_compliant_nested_type=False,
    )
    files = sorted((tmp_path / "run" / "completions").glob("*.parquet"))
    assert len(files) < 12, "tiny shards must share units"
    schema = pq.read_schema(files[0])
    assert schema.names[:5] == ["tags", "note", "nested", "shard", "out_shard"] and "prompt" not in schema.names
    assert str(schema.field("tags").type) == "list<array: int64>" and schema.field("note").nullable
    assert schema.field("nested").type == pa.struct([("colour", colours.type)])
    metadata = pq.read_metadata(files[0]).row_group(0)
    assert {metadata.column(i).compression for i in range(metadata.num_columns)} == {"UNCOMPRESSED"}
    assert len(rows) == 120


def test_a_giant_row_group_with_a_prompt_of_five_megabytes(tmp_path: Path, oracle: Oracle) -> None:
    prompts = [f"x{k}" for k in range(3000)]
    prompts[1500] = "word " * 1_000_000
    rows = run(
        tmp_path,
        pa.table({"prompt": prompts}),
        "input.prompt_column=prompt",
        "sampling.max_tokens=1",
        "model.dtype=float64",
        row_group_size=3000,
    )
    assert [row["prompt"] for row in rows] == prompts
    assert {row["row"]: row["error"] for row in rows if row["error"]} == {1500: "prompt_too_long"}
    for k in (0, 1023, 1024, 2999):
        assert rows[k]["completion"] == oracle.complete(prompts[k], 1)


def test_no_row_at_all(tmp_path: Path) -> None:
    empty = pa.table({"prompt": pa.array([], pa.string())})
    assert run(tmp_path, {"a.parquet": empty, "b.parquet": empty}, "input.prompt_column=prompt") == []
    assert "0 of 0" in batchinfer("report", tmp_path / "run").stdout


def test_stop_strings_across_tokens_and_scripts(tmp_path: Path) -> None:
    """Each row again, with a stop string out of the middle of what it says without one; drawn wildly, so in many scripts."""
    request = [
        "input.prompt_column=prompt",
        "sampling.temperature=4",
        "sampling.max_tokens=24",
        "sampling.ignore_eos=true",
        "model.dtype=float64",
        "output.token_ids=true",
    ]
    table = pa.table({"prompt": ["Return the ", "naïve 雪 🎉 ", "def f(x):\n", "The "] * 36})
    whole = [row["completion"] for row in run(tmp_path, table, *request, name="whole")]
    starts = [
        next((i for i, letter in enumerate(text) if letter > "~" and letter != "\ufffd"), 2 + k % 12)
        for k, text in enumerate(whole)
    ]
    stops = [text[start : start + 1 + k % 5] for k, (text, start) in enumerate(zip(whole, starts, strict=True))]
    assert any(not stop.isascii() for stop in stops)
    table = table.append_column("how", [[json.dumps({"stop": ["never said", stop]}) for stop in stops]])
    rows = run(tmp_path, table, *request, "input.sampling_column=how", name="stopped")
    for row, text, stop in zip(rows, whole, stops, strict=True):
        assert row["finish_reason"] == "stop", (stop, text, row)
        if "\ufffd" not in stop:  # half a character is held back until it is whole, or can not become so
            assert row["completion"] == text[: text.index(stop)], (stop, text)


SETTINGS: dict[str, list[str]] = {
    "plain": [],
    "small units and steps": ["input.rows_per_unit=3", "engine.max_num_seqs=5", "engine.max_num_batched_tokens=17"],
    "odd blocks, half the rows": ["engine.block_size=7", "engine.max_num_seqs=1", "input.rows_per_unit=11", "input.limit=20"],
    "three replicas": ["hw.gpus_per_node=3", "hw.tensor_parallel=1", "input.rows_per_unit=4"],
    "with a shard more": [],
}


@pytest.mark.slow
def test_drawn_text_depends_on_the_row_alone(tmp_path: Path) -> None:
    words = ["Return", "the", "list", "of", "words", "and", "a", "number", "for", "each", "file", "in", "it"]
    prompts = [" ".join(words[: k % 12 + 1]) for k in range(40)]
    inputs = tmp_path / "in"
    inputs.mkdir()
    pq.write_table(pa.table({"prompt": prompts}), inputs / "b.parquet")
    expected: dict[Any, Any] = {}
    for name, settings in SETTINGS.items():
        if name == "with a shard more":
            pq.write_table(pa.table({"prompt": prompts[::-1][:13]}), inputs / "a.parquet")
        run_dir = tmp_path / name
        done = batchinfer(
            *QUICK,
            f"input.paths=['{inputs}']",
            "input.prompt_column=prompt",
            "model.dtype=float64",
            "output.token_ids=true",
            "sampling.temperature=0.8",
            "sampling.max_tokens=12",
            f"output.dir='{run_dir}'",
            *settings,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = texts(run_dir)
        expected = expected or found
        same = {key: row for key, row in found.items() if key[0] == "b.parquet"}
        assert same == {key: row for key, row in expected.items() if key in same}, name
        assert len(same) == (20 if "input.limit=20" in settings else 40)
