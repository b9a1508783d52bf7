"""What `plan` says: what a request comes to, the layouts that a node could have, and what would make it fit."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence

from batchinfer.data.schema import num_rows
from batchinfer.job.demand import BYTES_PER_TOKEN
from batchinfer.job.layout import Layout
from batchinfer.job.plan import Plan
from batchinfer.memory import gib
from batchinfer.prediction import Prediction, unpredictable

Lines = Iterator[tuple[str, str]]
LAYOUTS = "layouts of a node, replicas x ranks"
LAYOUT_HEAD = ("layout", "KV tokens", "tokens/s out", "time", "GPU-hours", "")


def show(plan: Plan) -> None:
    """Tables on a terminal, plain aligned lines elsewhere."""
    found, table = lines(plan), layout_rows(plan)
    if not sys.stdout.isatty():
        print("\n".join(f"{what + ('' if what.startswith(' ') else ':'):<20}{how}" for what, how in found))
        if table:
            print(f"{LAYOUTS}:", *_aligned([LAYOUT_HEAD, *table]), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table

    console, grid, layouts = Console(), Table(title="plan", show_header=False), Table(title=LAYOUTS)
    for what, how in found:
        grid.add_row(what, how)
    console.print(grid)
    for number, name in enumerate(LAYOUT_HEAD):
        layouts.add_column(name, justify="right" if 0 < number < len(LAYOUT_HEAD) - 1 else "left")
    for row in table:
        layouts.add_row(*row)
    if table:
        console.print(layouts)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Cells in columns: numbers to the right, words to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, words in rows:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
        yield "  ".join(["  " + first.ljust(widths[0]), *cells, words]).rstrip()


def lines(plan: Plan) -> list[tuple[str, str]]:
    """(what, how much) in the order of reading; parts of the line above are indented."""
    return [*_work(plan), *_hardware(plan), *_memory(plan), *_time(plan)]


def _work(plan: Plan) -> Lines:
    rows, n = sum(num_rows(unit) for unit in plan.units), plan.config.sampling.n
    yield "run directory", str(plan.config.output.dir)
    yield "input", f"{_count(rows, 'row')} of {_count(len(plan.inputs.shards), 'shard')} in {_count(len(plan.units), 'unit')}"
    if n > 1:
        yield "samples", f"{rows * n:,}, {n:,} of each row, which share its prompt"
    if plan.sampled is not None:
        how = "" if plan.sampled.counted else f", guessed at {BYTES_PER_TOKEN} bytes a token: no tokenizer"
        yield "prompt tokens", f"about {plan.sampled.prompt_tokens:,} (from {_count(plan.sampled.rows, 'row')}{how})"
    yield "completion tokens", _completion_tokens(plan, rows * n)


def _completion_tokens(plan: Plan, sequences: int) -> str:
    """Rows with sampling of their own may ask for more than the run, and for less."""
    common = f"{sequences * plan.config.sampling.max_tokens:,}"
    if plan.config.input.sampling_column is None:
        return f"at most {common}"
    if plan.sampled is None or not plan.sampled.counted or not plan.sampled.demand.sequences:
        return f"{common}, where no row asks for another length"
    demand = plan.sampled.demand
    mean = statistics.fmean(demand.sample.completions)
    return f"about {round(mean * demand.sequences):,} at full length (from {_count(plan.sampled.rows, 'row')})"


def _hardware(plan: Plan) -> Lines:
    hw, nodes, fitted = plan.fitted.hw, plan.config.launcher.nodes, plan.fitted
    what = f"{hw.gpu} ({hw.interconnect or 'no link'})" if hw.gpu else "CPU process"
    yield "hardware", f"{_count(nodes, 'node')} of {hw.gpus_per_node:,} x {what}"
    replicas, asked = _count(nodes // hw.nodes_per_replica * fitted.chosen.replicas, "replica"), plan.config.hw.tensor_parallel
    span = f" over {hw.nodes_per_replica:,} nodes" if hw.nodes_per_replica > 1 else ""
    yield "layout", f"{replicas} of {_count(fitted.chosen.ranks, 'rank')}{span} (hw.tensor_parallel={asked})"
    parameters = f"{fitted.shape.num_parameters():,} parameters in {fitted.dtype}"
    yield "model", f"{parameters}, sequences of up to {fitted.max_model_len:,} tokens"


def _memory(plan: Plan) -> Lines:
    memory = plan.fitted.memory
    verdict = "fits" if memory.fits else f"DOES NOT FIT, {gib(memory.sequence_bytes - memory.left_bytes)} are missing"
    yield "memory of a rank", f"{gib(memory.usable_bytes)} of {gib(memory.device_bytes)} may be used: {verdict}"
    yield "  weights", gib(memory.weight_bytes)
    yield "  working memory", f"{gib(memory.activation_bytes)} for a step of {plan.config.engine.max_num_batched_tokens:,} tokens"
    yield "  overhead", gib(memory.context_bytes) + _communication(plan)
    a_token = f"{memory.kv_bytes_per_token / 1024:,.1f} KiB a token"
    if memory.fits:
        yield "  KV cache", f"{gib(memory.kv_bytes)} at {a_token}"
        yield (
            "  which holds",
            f"{memory.kv_tokens:,} tokens: {_count(memory.concurrent_sequences, 'sequence')} of full length at once",
        )
    else:
        yield "  KV cache", f"{gib(memory.sequence_bytes)} at least, at {a_token}: one sequence of full length"
    if memory.graph_bytes:
        yield "  CUDA graphs", f"{gib(memory.graph_bytes)}, out of what may not be used"
    if not memory.fits:
        yield "would fit", memory.advice.removesuffix(" would fit")


def _communication(plan: Plan) -> str:
    memory = plan.fitted.memory
    if plan.fitted.hw.gpu is None:
        return " of libraries"
    return " of CUDA context" + (f", {gib(memory.communication_bytes)} between ranks" if memory.communication_bytes else "")


def _time(plan: Plan) -> Lines:
    fitted, engine = plan.fitted, plan.config.engine
    prediction = fitted.chosen.prediction
    if prediction is not None:
        rate, hours = f"{prediction.tokens_out_s:,.0f} tokens/s out", f"{_hours(prediction)} GPU-hours"
        yield "time", f"about {duration(prediction.seconds)}, {rate}, {hours}"
        yield "  predicted", "from the first step to the last, completions at full length"
    elif fitted.memory.fits and fitted.hw.gpu is not None and plan.sampled and plan.sampled.demand.sequences:
        yield "time", f"not predicted: {unpredictable(fitted.shape, fitted.dtype, fitted.hw, engine)}"


def layout_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Cells as LAYOUT_HEAD names them. Empty where there is no choice."""
    found = plan.fitted.layouts
    return [_layout_row(layout, layout is plan.fitted.chosen) for layout in found] if len(found) > 1 else []


def _layout_row(layout: Layout, chosen: bool) -> tuple[str, ...]:
    memory, prediction = layout.memory, layout.prediction
    name = f"{layout.replicas} x {layout.ranks}"
    if not memory.fits:
        return name, *["-"] * 4, f"needs {gib(memory.usable_bytes - memory.left_bytes + memory.sequence_bytes)}"
    figures = ["-"] * 3
    if prediction is not None:
        figures = [f"{prediction.tokens_out_s:,.0f}", duration(prediction.seconds), _hours(prediction)]
    return name, f"{memory.kv_tokens:,}", *figures, "chosen" if chosen else ""


def _hours(prediction: Prediction) -> str:
    return f"{prediction.gpu_hours:,.1f}" if prediction.gpu_hours >= 10 else f"{prediction.gpu_hours:#,.2g}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s"))
    return f"{seconds / size:,.{1 if seconds >= 10 else 2}f} {unit}"
