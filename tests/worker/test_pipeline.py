"""Rows on either side of an engine that is played by hand: claimed, ordered, made into requests, gathered and committed."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchinfer as package
from batchinfer.config import from_dict
from batchinfer.data.columns import columns_to_read
from batchinfer.data.prompts import PreparedRow, PromptBuilder, row_seed
from batchinfer.data.reader import UnitReader, scan_shards
from batchinfer.data.schema import RowRange
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.data.writer import read_footer
from batchinfer.engine.sequence import Request, TokenLogprobs, TokenOutput
from batchinfer.job.claims import ClaimBoard, Identity
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.retry import begin, goals
from batchinfer.job.rundir import RunDir
from batchinfer.job.verify import verify
from batchinfer.worker import source
from batchinfer.worker.generations import Generations
from batchinfer.worker.isolation import Isolation
from batchinfer.worker.sink import CompletionSink
from batchinfer.worker.source import PREPARE_ROWS, OpenUnit, PendingRow, RequestSource

VOCABULARY = 50


class Run:
    """A run over one shard of token ids, with the parts that a replica would join."""

    def __init__(
        self,
        folder: Path,
        inputs: pa.Table,
        window: int = 1000,
        sampling: dict[str, Any] | None = None,
        replica: str = "r0",
        tokenizer: Tokenizer | None = None,
    ):
        pq.write_table(inputs, folder / "in.parquet")
        source = {"paths": [str(folder / "in.parquet")], "token_ids_column": "ids"}
        if "how" in inputs.column_names:
            source["sampling_column"] = "how"
        self.config = from_dict(
            {
                "seed": 5,
                "model": {"load_format": "random", "architecture": {"vocab_size": VOCABULARY}},
                "input": source,
                "sampling": sampling or {},
                "output": {"token_ids": True},
            }
        )
        found = scan_shards(self.config.input.paths)
        units = ((RowRange(0, 0, len(inputs)),),)
        self.run_dir = RunDir(folder / "run")
        request = request_of(self.config, found.shards, found.schema)
        self.manifest = Manifest.create(self.run_dir, self.config, found, inputs.column_names, units, request)
        self.board = ClaimBoard(self.run_dir, len(units), Identity.here(replica), 300)
        reader = UnitReader(found.root, found.shards, columns_to_read(self.config.input, found.schema, inputs.column_names))
        self.builder = PromptBuilder(self.config, None, None, 1000, VOCABULARY)
        generations = Generations(self.run_dir, goals(self.run_dir), "")
        self.source = RequestSource(
            self.run_dir,
            self.manifest,
            self.board,
            reader,
            self.builder,
            window,
            window // 4,
            generations,
            Isolation(self.run_dir, self.manifest, replica, lambda: True),
        )
        self.sink = CompletionSink(
            self.run_dir, self.manifest, self.config, replica, tokenizer, found.schema, lambda: None, self.source.look
        )

    def take(self, count: int) -> list[PendingRow]:
        rows: list[PendingRow] = []
        deadline = time.monotonic() + 20
        while len(rows) < count and time.monotonic() < deadline:
            row = self.source.take()
            if row is None:
                time.sleep(0.001)
            else:
                rows.append(row)
        return rows

    def requests(self, count: int) -> list[Request]:
        self.source.start()
        return [request for row in self.take(count) for request in self.sink.admit(row)]

    def stop(self) -> None:
        """As a replica that is told to."""
        self.source.stop()
        self.sink.save({unit: self.board.epoch(unit) for unit in self.board.held()})
        self.sink.close()
        for unit in self.board.held():
            self.board.release(unit)

    def finish(self) -> list[dict[str, Any]]:
        assert self.sink.close() == []
        self.source.stop()
        assert verify(self.run_dir) == []
        return pq.read_table(next(self.run_dir.completions.glob("*.parquet"))).to_pylist()


def test_the_last_commit_ends_the_source_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CLAIM_INTERVAL_S", 60.0)
    run = Run(tmp_path, pa.table({"ids": [[1], [2]]}))
    requests = run.requests(2)
    time.sleep(0.2)  # it has found nothing further to claim, and waits
    assert not run.source.finished
    run.sink.accept([output(request, [4], ends=True) for request in requests], 0)
    deadline = time.monotonic() + 10
    while not run.source.finished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.source.finished
    run.finish()


def test_a_sample_whose_row_fails_in_a_retry_leaves_the_others_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, pa.table({"ids": [[1, 2], [3], [4]]}), sampling={"n": 2})
    requests = run.requests(3)
    for number, request in enumerate(requests):
        overflow = {"error": ("bad_logits", "it overflowed")} if number in (1, 4, 5) else {}
        run.sink.accept([output(request, [number], ends=True, **overflow)], 0)
    run.finish()
    begin(run.run_dir, [])
    generations = Generations(run.run_dir, goals(run.run_dir), "")
    keys = [("in.parquet", row) for row in range(3)]
    inputs = pq.read_table(tmp_path / "in.parquet")
    unit = OpenUnit(0, 0, keys, inputs, [[], [], []], 2, {}, 1, generations.earlier(0, keys, inputs))
    error = PreparedRow(None, None, (), "template_error", "no prompt any more", 0)
    sink = CompletionSink(run.run_dir, run.manifest, run.config, "r1", None, inputs.schema, lambda: None)
    prepared = run.builder.prepare(inputs.slice(2), keys[2:])[0]
    again = [request for index, told in ((0, error), (2, prepared)) for request in sink.admit(PendingRow(unit, index, told))]
    assert [request.seed for request in again] == [request.seed for request in requests[4:]]
    sink.accept([output(request, [9], ends=True) for request in again], 0)
    assert sink.close() == [] and verify(run.run_dir) == []
    rows = pq.read_table(run.run_dir.completion(0, 1)).to_pylist()
    assert [(row["row"], row["sample"], row["token_ids"], row["error"], row["num_prompt_tokens"]) for row in rows] == [
        (0, 0, [0], None, 2),
        (0, 1, None, "template_error", 2),
        (1, 0, [2], None, 1),
        (1, 1, [3], None, 1),
        (2, 0, [9], None, 1),
        (2, 1, [9], None, 1),
    ]


def output(request: Request, tokens: list[int], ends: bool, **more: Any) -> TokenOutput:
    return TokenOutput(request.request_id, tokens, "length" if ends else None, 0.1, 0.2 if ends else None, **more)


def told(token_id: int, k: int = 0) -> TokenLogprobs:
    return TokenLogprobs(token_id, -token_id / 4, 1, [(i, -i / 4) for i in range(k)])


def test_a_row_becomes_its_samples_next_to_each_other_with_seeds_of_their_own(tmp_path: Path) -> None:
    run = Run(tmp_path, pa.table({"ids": [[1], [2], [99], [3]]}), sampling={"n": 3})
    requests = run.requests(4)
    assert [request.prompt_token_ids for request in requests] == [[1]] * 3 + [[2]] * 3 + [[3]] * 3
    keys = [(row, sample) for row in (0, 1, 3) for sample in range(3)]
    assert [request.seed for request in requests] == [row_seed(5, "in.parquet", *key) for key in keys]
    assert len({request.request_id for request in requests}) == 9
    for number, request in enumerate(reversed(requests)):
        assert run.sink.totals.rows_done == 1 + number // 3, "a row is done with its last sample"
        assert run.sink.accept([output(request, [number], ends=True)], number) == []
    rows = run.finish()
    assert [(row["row"], row["sample"]) for row in rows] == [*keys[:6], (2, 0), *keys[6:]]
    assert [row["token_ids"] for row in rows] == [[8], [7], [6], [5], [4], [3], None, [2], [1], [0]]
    assert [row["error"] for row in rows] == [None] * 6 + ["bad_token_ids"] + [None] * 3
    assert [row["ids"] for row in rows] == [[1]] * 3 + [[2]] * 3 + [[99]] + [[3]] * 3
    footer = read_footer(next(run.run_dir.completions.glob("*.parquet")))
    assert (footer.rows, footer.samples, run.sink.totals.rows_committed) == (4, 10, 4)
    assert run.sink.totals.errors == {"bad_token_ids": 1}


def test_a_sample_that_breaks_off_is_an_error_row_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path, pa.table({"ids": [[1]]}), sampling={"n": 3})
    first, second, third = run.requests(1)
    broken = TokenOutput(second.request_id, [], "error", 0.1, 0.2, error=("bad_logits", "something overflowed"))
    run.sink.accept([output(first, [4], ends=True), broken, output(third, [5], ends=True)], 0)
    rows = run.finish()
    assert [(row["token_ids"], row["error"], row["error_message"]) for row in rows] == [
        ([4], None, None),
        (None, "bad_logits", "something overflowed"),
        ([5], None, None),
    ]
    assert rows[1]["finish_reason"] == "error" and rows[1]["num_completion_tokens"] == 0


def test_rows_that_ask_for_samples_of_their_own(tmp_path: Path) -> None:
    how = ['{"n": 2}', None, '{"n": 0}', '{"n": 1, "seed": 8}']
    run = Run(tmp_path, pa.table({"ids": [[1]] * 4, "how": how}), sampling={"n": 3})
    requests = run.requests(4)
    seeds = [(5, 0, 0), (5, 0, 1), (5, 1, 0), (5, 1, 1), (5, 1, 2), (8, 3, 0)]
    assert [request.seed for request in requests] == [row_seed(seed, "in.parquet", row, sample) for seed, row, sample in seeds]
    run.sink.accept([output(request, [1], ends=True) for request in requests], 0)
    assert [(row["row"], row["sample"]) for row in run.finish()] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0)]


def test_logprobs_are_kept_token_by_token_and_the_prompts_once_a_row(tmp_path: Path) -> None:
    how = [None, '{"logprobs": 2, "n": 1}', '{"logprobs": 200}']
    run = Run(tmp_path, pa.table({"ids": [[1, 2]] * 3, "how": how}), sampling={"n": 2, "logprobs": 0, "prompt_logprobs": 1})
    first, second, third = run.requests(3)
    assert [(r.sampling.logprobs, r.sampling.prompt_logprobs) for r in (first, second, third)] == [(0, 1), (0, None), (2, 1)]
    prompt = [None, told(2, 1)]
    run.sink.accept([output(second, [5], False, logprobs=[told(5)])], 0)
    run.sink.accept([output(second, [6], True, logprobs=[told(6)])], 1)
    run.sink.accept([output(third, [7], True, logprobs=[told(7, 2)], prompt_logprobs=prompt)], 1)
    run.sink.accept([output(first, [8, 9], True, logprobs=[told(8), told(9)], prompt_logprobs=prompt)], 2)
    rows = run.finish()
    assert [row["token_ids"] for row in rows] == [[8, 9], [5, 6], [7], None]
    found = [
        row["logprobs"] and [(t["token_id"], t["logprob"], t["rank"], len(t["top"])) for t in row["logprobs"]] for row in rows
    ]
    assert found == [[(8, -2.0, 1, 0), (9, -2.25, 1, 0)], [(5, -1.25, 1, 0), (6, -1.5, 1, 0)], [(7, -1.75, 1, 2)], None]
    whole = [None, {"token_id": 2, "logprob": -0.5, "rank": 1, "top": [{"token_id": 0, "logprob": 0.0}]}]
    assert [row["prompt_logprobs"] for row in rows] == [whole, whole, whole, None]
    assert rows[3]["error"] == "bad_sampling" and "sampling.logprobs=200" in rows[3]["error_message"]


def test_a_window_is_ordered_and_handed_over_whole(tmp_path: Path) -> None:
    """The first rows go as soon as they are there; behind them, windows form as long as there is something to take."""
    groups, count, window = 4, 5 * PREPARE_ROWS, 2 * PREPARE_ROWS
    prompts = [[k % groups] * 64 + list(divmod(k, VOCABULARY)) for k in range(count)]
    run = Run(tmp_path, pa.table({"ids": prompts}), window)
    run.source.start()
    rows: list[PendingRow] = []
    deadline = time.monotonic() + 20
    while len(rows) < count and time.monotonic() < deadline:
        ready = run.source._rows.qsize()
        if ready == window or len(rows) + ready == count:  # never faster than they are prepared
            rows += run.take(1)
        else:
            time.sleep(0.0001)
    run.source.stop()
    expected: list[int] = []
    for start, stop in ((0, PREPARE_ROWS), (PREPARE_ROWS, 3 * PREPARE_ROWS), (3 * PREPARE_ROWS, count)):
        expected += sorted(range(start, stop), key=lambda k: (k % groups, k))
    assert [row.index for row in rows] == expected


def test_the_first_rows_do_not_wait_for_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, pa.table({"ids": [[1]] * (3 * PREPARE_ROWS)}))
    go_on, prepare = threading.Event(), run.builder.prepare
    calls = 0

    def slow(table: pa.Table, keys: Any) -> list[PreparedRow]:
        nonlocal calls
        calls += 1
        assert calls == 1 or go_on.wait(20)
        return prepare(table, keys)

    monkeypatch.setattr(run.builder, "prepare", slow)
    run.source.start()
    assert [row.index for row in run.take(PREPARE_ROWS)] == list(range(PREPARE_ROWS))
    assert run.source.take() is None, "take never waits"
    go_on.set()
    assert len(run.take(2 * PREPARE_ROWS)) == 2 * PREPARE_ROWS
    run.source.stop()


def test_no_more_lies_ready_than_the_window(tmp_path: Path) -> None:
    run = Run(tmp_path, pa.table({"ids": [[1]] * 1024}), window=10)
    run.source.start()
    (row,) = run.take(1)
    deadline = time.monotonic() + 20
    while run.source._rows.qsize() < 10 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert run.source._rows.qsize() == 10 and row.index == 0
    assert len(run.board.held()) == 1
    run.source.stop()


def test_a_stopped_replicas_rows_are_gone_on_with(tmp_path: Path) -> None:
    inputs, sampling = pa.table({"ids": [[1, 2], [3, 4], [5, 6]]}), {"n": 2, "logprobs": 0, "prompt_logprobs": 0}
    first = Run(tmp_path, inputs, sampling=sampling)
    ended, begun, broken, *others = first.requests(3)
    prompt = [None, told(2)]
    first.sink.accept([output(ended, [7, 8], True, logprobs=[told(7), told(8)], prompt_logprobs=prompt)], 4)
    first.sink.accept([output(begun, [9], False, logprobs=[told(9)])], 5)
    error = TokenOutput(broken.request_id, [3], "error", 0.1, 0.2, [told(3)], error=("bad_logits", "something overflowed"))
    first.sink.accept([error], 6)
    first.stop()
    assert [path.name for path in first.run_dir.partials.iterdir()] == ["000000.0.parquet"]

    second = Run(tmp_path, inputs, sampling=sampling, replica="r1")
    requests = second.requests(3)
    assert [request.completion_token_ids for request in requests] == [[9], [], [], [], []], "the others start over"
    assert [request.seed for request in requests] == [begun.seed, broken.seed, *(request.seed for request in others)]
    second.stop()  # before its engine has said anything

    third = Run(tmp_path, inputs, sampling=sampling, replica="r2")
    rest = third.requests(3)
    assert rest[0].completion_token_ids == [9]
    third.sink.accept([TokenOutput(rest[0].request_id, [6], "length", None, 0.2, [told(6)])], 11)
    third.sink.accept(
        [output(request, [1], True, logprobs=[told(1)], prompt_logprobs=[None, told(4)]) for request in rest[1:]], 12
    )
    rows = third.finish()
    assert [row["token_ids"] for row in rows] == [[7, 8], [9, 6], [1], [1], [1], [1]]
    assert [[t["token_id"] for t in row["logprobs"]] for row in rows[:2]] == [[7, 8], [9, 6]]
    assert [row["prompt_logprobs"][1]["token_id"] for row in rows[:2]] == [2, 2], "told once, kept"
    assert [(row["replica"], row["step_first"], row["step_last"]) for row in rows[:3]] == [
        ("r0", 4, 4),
        ("r2", 11, 11),
        ("r2", 12, 12),
    ]
    assert rows[1]["ttft_s"] == 0.1 and rows[1]["latency_s"] > 0
    assert not list(third.run_dir.partials.iterdir()), "they go with the commit"


def test_what_was_saved_outlasts_a_stop_before_its_row_is_begun(tmp_path: Path) -> None:
    inputs = pa.table({"ids": [[1], [2], [3]]})
    first = Run(tmp_path, inputs)
    first.sink.accept([output(request, [4], False) for request in first.requests(3)], 0)
    first.stop()
    second = Run(tmp_path, inputs, replica="r1")
    (request,) = second.requests(1)
    second.sink.accept([TokenOutput(request.request_id, [5], None, None, None)], 0)
    second.stop()
    third = Run(tmp_path, inputs, replica="r2")
    requests = third.requests(3)
    assert [request.completion_token_ids for request in requests] == [[4, 5], [4], [4]]
    third.stop()


def test_another_prompt_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Run(tmp_path, pa.table({"ids": [[1], [2]]}))
    first.sink.accept([output(request, [4], False) for request in first.requests(2)], 0)
    first.stop()
    second = Run(tmp_path, pa.table({"ids": [[1], [2]]}), replica="r1")
    prepare = second.builder.prepare

    def otherwise(table: pa.Table, keys: Any) -> list[PreparedRow]:
        return [replace(row, token_ids=[row.token_ids[0] % 2 + 1]) for row in prepare(table, keys) if row.token_ids]

    monkeypatch.setattr(second.builder, "prepare", otherwise)
    assert [request.completion_token_ids for request in second.requests(2)] == [[], []]
    second.stop()


def test_a_stop_string_is_found_across_the_border(tmp_path: Path) -> None:
    """Whatever part of it the stopped replica had seen."""
    tokenizer = Tokenizer.load(Path(package.__file__).parent / "tiny" / "model")
    (tokens,) = tokenizer.encode_batch(["Return the value of the list"], False)
    sampling = {"stop": ["e of the l"]}
    for k in range(1, len(tokens) - 1):
        folder = tmp_path / str(k)
        folder.mkdir()
        first = Run(folder, pa.table({"ids": [[1]]}), sampling=sampling, tokenizer=tokenizer)
        (request,) = first.requests(1)
        assert first.sink.accept([output(request, tokens[:k], False)], 0) == []
        first.stop()
        second = Run(folder, pa.table({"ids": [[1]]}), sampling=sampling, replica="r1", tokenizer=tokenizer)
        (request,) = second.requests(1)
        assert request.completion_token_ids == tokens[:k]
        assert second.sink.accept([TokenOutput(request.request_id, tokens[k:], None, None, None)], 0) == [request.request_id]
        (row,) = second.finish()
        assert (row["completion"], row["finish_reason"]) == ("Return the valu", "stop")
