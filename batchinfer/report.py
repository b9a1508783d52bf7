"""What a run did, in numbers: `report/summary.json`, a table, and the first completions.

Everything is derived from the footers and columns of `completions/`, the segments of `stats/` and what the replicas said,
file by file: memory does not grow with the run. Percentiles come from histograms with bins half a per cent wide.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.schema import OF_THE_ROW, UnitFooter, num_rows
from batchinfer.data.writer import DamagedFile, read_footer
from batchinfer.display import duration
from batchinfer.job.manifest import Manifest
from batchinfer.job.replica import read_death, read_progress
from batchinfer.job.rundir import RunDir
from batchinfer.memory import gib
from batchinfer.publish import replace_bytes
from batchinfer.stats import QUANTILES, segments
from batchinfer.stretches import Ending, Span, tails, wall

SAMPLES, SAMPLE_CHARS = 3, 200
FIRST_COLUMNS = ("shard", "row", "sample", "completion")
ERROR_COLUMNS = ("shard", "row", "sample", "error", "error_message")
REPORTED = (*ERROR_COLUMNS, "finish_reason", "ttft_s", "latency_s", "num_completion_tokens")
SUMMED = ("steps", "prefill_seqs", "decode_seqs", "prefill_tokens", "prefix_hit_tokens", "preempted")
STEP_COLUMNS = ["started", "duration_s", "kv_blocks_used", "kv_blocks_total", "gpu_memory_bytes", *SUMMED]
SHORT = 0.95  # a prediction is of completions at full length: those with less than this share of it are spoken of


class LogHistogram:
    """Counts of positive numbers in bins of constant relative width, 1e-6 to 1e6. Quantiles are right to 0.25 %."""

    LOW, WIDTH, BINS = 1e-6, float(np.log1p(0.005)), 5600

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, dtype=np.int64)

    def add(self, values: np.ndarray[Any, Any]) -> None:
        bins = np.log(np.maximum(values, self.LOW) / self.LOW) / self.WIDTH
        self.counts += np.bincount(np.minimum(bins.astype(np.int64), self.BINS - 1), minlength=self.BINS)

    def quantile(self, q: float) -> float | None:
        """The smallest bin below which lie at least a share q of the numbers; None of nothing."""
        total = int(self.counts.sum())
        if total == 0:
            return None
        index = int(np.searchsorted(np.cumsum(self.counts), max(1, np.ceil(q * total))))
        return self.LOW * float(np.exp((index + 0.5) * self.WIDTH))

    def summary(self) -> dict[str, float | None]:
        return {name: self.quantile(q) for name, q in QUANTILES.items()}


def summarise(run_dir: RunDir) -> dict[str, Any]:
    """Everything the report says, as plain values. Raises ConfigError when there is no manifest, ValueError for a torn file."""
    manifest = Manifest.load(run_dir)
    rows = _rows(run_dir, manifest.config.output.prefix)
    steps = _steps(run_dir)
    total, seconds = sum(map(num_rows, manifest.units)), steps["wall_s"]
    rates = {"rows_s": rows["rows"], "tokens_in_s": rows["prompt_tokens"], "tokens_out_s": rows["completion_tokens"]}
    summary = {
        "run": str(run_dir.root),
        "complete": rows["units"] == len(manifest.units),
        "rows_total": total,
        "units_total": len(manifest.units),
        **rows,
        **steps,
        **{name: count / seconds if seconds else None for name, count in rates.items()},
        "replicas": _replicas(run_dir),
    }
    return {**summary, "predicted": _predicted(run_dir, summary)}


def _predicted(run_dir: RunDir, summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]] | None:
    """What was predicted beside what came. None without a prediction (on a CPU), or when submissions had unlike hardware."""
    records = [json.loads(path.read_bytes()) for path in sorted(run_dir.submissions.glob("*/submission.json"))]
    expected = [record.get("expected") for record in records]
    if not expected or None in expected or len({(e["gpu"], e["gpus"], e["ranks"]) for e in expected}) > 1:
        return None
    newest, sequences, blocks = expected[-1], summary["samples"] - summary["error_rows"], summary["kv_blocks"]
    actual = {
        "tokens_out_s": summary["tokens_out_s"],
        "completion_tokens_a_sequence": summary["completion_tokens"] / sequences if sequences else None,
        "kv_tokens": None if blocks is None else blocks * newest["block_size"],
        "gpu_memory_bytes": summary["gpu_memory_bytes"],
    }
    newest["completion_tokens_a_sequence"] = newest["completion_tokens"] / newest["sequences"]
    return {name: {"predicted": newest[name], "actual": value} for name, value in actual.items()}


def report(run_dir: RunDir) -> int:
    """Write summary.json and print it with the first completions. Returns 0: a report of a run that is under way is one too."""
    summary = summarise(run_dir)
    run_dir.report.mkdir(exist_ok=True)
    replace_bytes(run_dir.report / "summary.json", json.dumps(summary, indent=1).encode())
    _print(table(summary), run_dir)
    completions = first_completions(run_dir)
    if completions:
        print("first completions (shard:row):", *completions, sep="\n")
    sys.stdout.flush()
    return 0


def _units(run_dir: RunDir) -> list[tuple[int, int]]:
    """The units that are done, and their generations that count, in order."""
    return sorted(run_dir.done_units().items())


def _rows(run_dir: RunDir, prefix: str) -> dict[str, Any]:
    errors: Counter[str] = Counter()
    examples: dict[str, dict[str, Any]] = {}
    reasons: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    histograms: dict[str, LogHistogram] = {name: LogHistogram() for name in ("ttft_s", "latency_s", "inter_token_s")}
    for unit, generation in _units(run_dir):
        path, footer, columns = run_dir.read_committed(unit, generation, partial(_look, prefix=prefix))
        sums.update({name: getattr(footer, name) for name in ("rows", "samples", "prompt_tokens", "completion_tokens")}, units=1)
        errors.update(footer.errors)
        if footer.errors.keys() - examples.keys():
            examples = _first_errors(path, columns) | examples
        _add_columns(columns, reasons, histograms)
    return {
        **{name: sums[name] for name in ("rows", "units", "samples", "prompt_tokens", "completion_tokens")},
        "error_rows": errors.total(),
        "errors": {code: {"rows": count, **examples[code]} for code, count in sorted(errors.items())},
        "finish_reasons": dict(sorted(reasons.items())),
        **{name: histogram.summary() for name, histogram in histograms.items()},
    }


def _look(path: Path, prefix: str) -> tuple[Path, UnitFooter, pa.Table]:
    """What the report needs of a file, its columns named without the prefix. Changes nothing: it may be called again."""
    footer = read_footer(path)  # first: it says what is wrong with a torn file
    columns = pq.read_table(path, columns=[prefix + name for name in REPORTED])
    return path, footer, columns.rename_columns(list(REPORTED))


def _first_errors(path: Path, columns: pa.Table) -> dict[str, dict[str, Any]]:
    """By code, where the first such row of a file is and what it says."""
    found: dict[str, dict[str, Any]] = {}
    for row in columns.filter(columns["error"].is_valid()).select(ERROR_COLUMNS).to_pylist():
        found.setdefault(row.pop("error"), row | {"first_in": str(path)})
    return found


def _add_columns(columns: pa.Table, reasons: Counter[str], histograms: Mapping[str, LogHistogram]) -> None:
    """The inter-token time of a row is its mean one: (latency - first token) / (tokens - 1)."""
    for entry in columns["finish_reason"].value_counts().to_pylist():
        reasons[entry["values"]] += entry["counts"]
    ttft, latency, tokens = (_floats(columns[name]) for name in ("ttft_s", "latency_s", "num_completion_tokens"))
    histograms["ttft_s"].add(ttft[~np.isnan(ttft)])
    histograms["latency_s"].add(latency[~np.isnan(latency)])
    several = (tokens > 1) & ~np.isnan(ttft) & ~np.isnan(latency)
    histograms["inter_token_s"].add((latency[several] - ttft[several]) / (tokens[several] - 1))


def _floats(column: Any) -> np.ndarray[Any, Any]:
    """float64, null as NaN."""
    return np.asarray(column.cast("float64").to_numpy(), dtype=np.float64)


def _steps(run_dir: RunDir) -> dict[str, Any]:
    """`wall_s` is first step to last, without the pauses between submissions: the time before a resume is not work. `tail_s` is
    that of the last submission, `tails_s` of each, or of several at once (`stretches`)."""
    spans: dict[str, Span] = {}
    sums: Counter[str] = Counter()
    kv_peak = 0.0
    kv_blocks: set[int] = set()
    gpu_memory = 0
    for replica, number in segments(run_dir):
        columns = _read_steps(run_dir.stats / f"{replica}-{number:06d}.parquet")
        values = {name: _floats(columns[name]) for name in STEP_COLUMNS}
        start, end = values["started"].min(), (values["started"] + values["duration_s"]).max()
        known = spans.get(replica, (start, end))
        spans[replica] = (min(known[0], start), max(known[1], end))
        for name in SUMMED:
            sums[name] += int(values[name].sum())
        kv_blocks.add(int(values["kv_blocks_total"].min()))
        gpu_memory = max(gpu_memory, int(np.nan_to_num(values["gpu_memory_bytes"]).max()))  # null where no driver says
        kv_peak = max(kv_peak, float((values["kv_blocks_used"] / np.maximum(values["kv_blocks_total"], 1)).max()))
    steps, tail_of = sums["steps"], tails(spans, _endings(run_dir, spans))
    return {
        "wall_s": wall(spans),
        "tail_s": next(reversed(tail_of.values()), None),
        "tails_s": tail_of,
        "steps": steps,
        "mean_batch_size": (sums["prefill_seqs"] + sums["decode_seqs"]) / steps if steps else None,
        "kv_peak_share": kv_peak if steps else None,
        "kv_blocks": min(kv_blocks, default=None),
        "gpu_memory_bytes": gpu_memory or None,
        "preemptions": sums["preempted"],
        "prefill_tokens": sums["prefill_tokens"],
        "prefix_hit_tokens": sums["prefix_hit_tokens"],
    }


def _read_steps(path: Path) -> Any:
    try:
        return pq.read_table(path, columns=STEP_COLUMNS)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(f"{path}: not a whole segment of statistics ({error}); move it away, no row depends on it") from error


def _endings(run_dir: RunDir, replicas: Iterable[str]) -> dict[str, Ending]:
    """Of those that came to an end with nothing left to do, or wait for it."""
    found = {}
    for name in replicas:
        said = read_progress(run_dir, name)
        is_idle = said.get("phase") in ("waiting", "done") and read_death(run_dir, name) is None
        found[name] = Ending(said.get("idle_since") if is_idle else None, said.get("last_commit"))
    return found


def _replicas(run_dir: RunDir) -> dict[str, Any]:
    """Per replica: rows, seconds of each phase up to its first token, and why it died, if it did."""
    found = {}
    for folder in sorted(run_dir.replicas.iterdir()):
        progress, death = read_progress(run_dir, folder.name), read_death(run_dir, folder.name)
        found[folder.name] = {
            "rows_done": progress.get("rows_done", 0),
            "phases_s": progress.get("phases", {}),
            "died": death.sentence() if death else None,
            "environment": _read_json(run_dir.environment(folder.name)),
        }
    return found


def _read_json(path: Path) -> Any:
    """None where there is nothing that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _made_on(summary: Mapping[str, Any]) -> str:
    """Hosts, GPUs and programs of the replicas that said them."""
    found = [r["environment"] for r in summary["replicas"].values() if r["environment"]]
    if not found:
        return ""
    gpus = Counter(gpu for gpu, _ in {(gpu["gpu"], gpu["uuid"]) for e in found for gpu in e["gpus"]})
    commits = sorted({e["git_commit"][:12] + "-dirty" * e["git_commit"].endswith("-dirty") for e in found if e["git_commit"]})
    drivers, torches = sorted({e["driver"] for e in found if e["driver"]}), sorted({e["versions"]["torch"] for e in found})
    hosts = len({e["host"] for e in found})
    parts = [f"{hosts:,} host{'' if hosts == 1 else 's'}", *(f"{count:,} x {gpu}" for gpu, count in sorted(gpus.items()))]
    named = (("driver", drivers), ("torch", torches), ("commit", commits))
    return ", ".join([*parts, *(f"{name} {' and '.join(values)}" for name, values in named if values)])


def table(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as (what, how much) for people; what is not known is left out."""
    several = summary["samples"] != summary["rows"]
    lines = [
        ("rows", f"{summary['rows']:,} of {summary['rows_total']:,} ({summary['units']:,} of {summary['units_total']:,} units)"),
        ("samples", f"{summary['samples']:,}" if several else ""),
        ("finish reasons", ", ".join(f"{reason} {count:,}" for reason, count in summary["finish_reasons"].items())),
        *((f"error {code}", _error_line(error)) for code, error in summary["errors"].items()),
        ("run them again", _retry_line(summary)),
        ("prompt tokens", _with_rate(summary["prompt_tokens"], summary["tokens_in_s"]) + (", of each sample" if several else "")),
        ("prefix cache", _prefix_line(summary)),
        ("completion tokens", _with_rate(summary["completion_tokens"], summary["tokens_out_s"])),
        ("time", _time_line(summary)),
        *(
            (what, _seconds(summary[key]))
            for what, key in (("first token", "ttft_s"), ("latency", "latency_s"), ("inter-token", "inter_token_s"))
        ),
        ("steps", _step_line(summary)),
        *_predicted_lines(summary["predicted"]),
        ("made on", _made_on(summary)),
        *((f"replica {name}", _replica_line(replica)) for name, replica in summary["replicas"].items()),
    ]
    return [(what, how) for what, how in lines if how]


def _time_line(summary: Mapping[str, Any]) -> str:
    line, tail = f"{duration(summary['wall_s'])} from the first step to the last", summary["tail_s"]
    return line if tail is None else f"{line}, tail {duration(tail)}"


def _retry_line(summary: Mapping[str, Any]) -> str:
    if not summary["errors"]:
        return ""
    hopeless = "" if summary["errors"].keys() - OF_THE_ROW else " (with the same result, unless the program has changed)"
    return f"python -m batchinfer retry {summary['run']}{hopeless}"


def _error_line(error: Mapping[str, Any]) -> str:
    rows = f"{error['rows']:,} row{'' if error['rows'] == 1 else 's'}"
    return f"{rows}, the first {error['shard']}:{error['row']}: {_shorten(error['error_message'])}"


def _with_rate(count: int, rate: float | None) -> str:
    return f"{count:,}" + (f" ({rate:,.0f}/s)" if rate is not None else "")


def _prefix_line(summary: Mapping[str, Any]) -> str:
    """Of the steps, not of the rows: what was computed for rows that a killed replica lost counts too."""
    computed, found = summary["prefill_tokens"], summary["prefix_hit_tokens"]
    if not found:
        return ""
    return f"{found:,} prompt tokens ({found / (found + computed):.0%}) found there, {computed:,} computed"


def _seconds(quantiles: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:,.3g} s" for name, value in quantiles.items() if value is not None)


def _step_line(summary: Mapping[str, Any]) -> str:
    if not summary["steps"]:
        return ""
    batch, peak = f"{summary['mean_batch_size']:,.1f} sequences each", f"KV at most {summary['kv_peak_share']:.0%} used"
    return f"{summary['steps']:,}, {batch}, {peak}, {summary['preemptions']:,} preemptions"


def _predicted_lines(predicted: Mapping[str, Mapping[str, float | None]] | None) -> Iterator[tuple[str, str]]:
    """What came beside what was predicted."""
    if predicted is None:
        return
    rate = _beside(predicted["tokens_out_s"], lambda value: f"{value:,.0f} tokens/s out")
    yield "throughput", rate and rate + _short(predicted["completion_tokens_a_sequence"])
    yield "KV cache", _beside(predicted["kv_tokens"], lambda value: f"{value:,.0f} tokens a replica")
    yield "GPU memory", _beside(predicted["gpu_memory_bytes"], lambda value: gib(int(value)))


def _beside(pair: Mapping[str, float | None], words: Callable[[float], str]) -> str:
    expected, actual = pair["predicted"], pair["actual"]
    if expected is None or actual is None:
        return ""
    return f"{words(actual)}, predicted {words(expected)} ({actual / expected - 1:+.1%})"


def _short(pair: Mapping[str, float | None]) -> str:
    """Said where the comparison limps."""
    share = (pair["actual"] or 0.0) / (pair["predicted"] or 1.0)
    return f", for completions at full length: these have {share:.0%} of it" if share < SHORT else ""


def _replica_line(replica: Mapping[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in replica["phases_s"].items() if seconds is not None)
    return "; ".join(filter(None, [f"{replica['rows_done']:,} rows", phases, replica["died"]]))


def first_completions(run_dir: RunDir) -> list[str]:
    """The first samples of the first rows that have one, shortened: one sees at a glance whether they are text."""
    prefix = Manifest.load(run_dir).config.output.prefix
    found: list[str] = []
    for unit, generation in _units(run_dir):
        with run_dir.read_committed(unit, generation, pq.ParquetFile) as file:
            for batch in file.iter_batches(64, columns=[prefix + name for name in FIRST_COLUMNS]):
                rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                found += [f"{shard}:{row}: {_shorten(text)}" for shard, row, k, text in rows if k == 0 and text is not None]
                if len(found) >= SAMPLES:
                    return found[:SAMPLES]
    return found


def _shorten(text: str) -> str:
    """One line in quotes; line ends and control characters visible."""
    return json.dumps(text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + "…", ensure_ascii=False)


def _print(lines: list[tuple[str, str]], run_dir: RunDir) -> None:
    if not sys.stdout.isatty():
        print("\n".join(f"{what + ':':<20} {how}" for what, how in lines))
        print(f"summary:             {run_dir.report / 'summary.json'}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=str(run_dir.root), show_header=False)
    for what, how in lines:
        grid.add_row(Text(what), Text(how))
    Console().print(grid)
