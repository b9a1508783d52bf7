"""What a request would do: units of work, memory, layout, and the frozen plan that a run starts from.

Everything here is known from the config, Parquet footers and a few hundred sampled rows: no GPU, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from batchinfer import hardware
from batchinfer.config import Config, ConfigError, HardwareConfig
from batchinfer.data.chat import ChatTemplate
from batchinfer.data.prompts import PromptBuilder, check_columns, columns_needed, load_tokenizer
from batchinfer.data.reader import InputSet, UnitReader, scan_shards
from batchinfer.data.schema import RowRange, Shard, Unit, num_rows
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.rundir import RunDir
from batchinfer.memory import MemoryPlan, gib, max_model_len, plan_memory, resolve_hw
from batchinfer.model.config import ModelShape, load_shape, resolve_dtype

SAMPLE_PLACES, SAMPLE_ROWS = 8, 40  # rows are sampled at so many places, so many at each
BYTES_PER_TOKEN = 4  # of text, where no tokenizer is at hand; English is near it
TAIL_SHARE = 4  # a unit holds at most a quarter of what is left, so that the last ones are small
SMALLEST_SHARE = 8  # but not less than an eighth of rows_per_unit


def cut_units(shards: Sequence[Shard], rows_per_unit: int, limit: int | None) -> tuple[Unit, ...]:
    """Cuts the first `limit` rows into units of at most `rows_per_unit` rows, in input order, each row once.

    A unit is one range of one shard; shards smaller than it share one, and so does a rest of a shard of less than half a unit.
    Towards the end units shrink from a quarter of what is left down to an eighth of `rows_per_unit`, so that replicas finish
    together. Linear in shards and units.
    """
    total = sum(shard.num_rows for shard in shards)
    left = total if limit is None else min(limit, total)
    units: list[Unit] = []
    ranges: list[RowRange] = []
    space = target = _unit_size(left, rows_per_unit)
    for number, shard in enumerate(shards):
        start, stop = 0, min(shard.num_rows, left)
        if stop > space and space <= target // 2:
            units.append(tuple(ranges))
            ranges, space = [], (target := _unit_size(left, rows_per_unit))
        while start < stop:
            taken = min(space, stop - start)
            ranges.append(RowRange(number, start, start + taken))
            start, left, space = start + taken, left - taken, space - taken
            if space == 0:
                units.append(tuple(ranges))
                ranges, space = [], (target := _unit_size(left, rows_per_unit))
    return tuple([*units, tuple(ranges)] if ranges else units)


def _unit_size(left: int, rows_per_unit: int) -> int:
    smallest = max(1, rows_per_unit // SMALLEST_SHARE)
    return min(rows_per_unit, max(smallest, left // TAIL_SHARE))


@dataclass(frozen=True)
class Fit:
    """The model on the hardware: everything that said `auto`, as facts."""

    shape: ModelShape
    hw: HardwareConfig
    dtype: str
    max_model_len: int
    memory: MemoryPlan


def fit(config: Config) -> Fit:
    """Resolves hardware, dtype and length, and does the arithmetic of memory. Raises ConfigError for what cannot be."""
    shape = load_shape(config.model)
    hw = resolve_hw(config, shape)
    dtype = resolve_dtype(config.model.dtype, shape, hw.gpu is not None)
    length = max_model_len(config.model, shape)
    return Fit(shape, hw, dtype, length, plan_memory(shape, dtype, hw, config.engine, length))


def resolved(config: Config) -> Config:
    """The config of one submission: hardware and dtype as facts. Raises ConfigError when the model does not fit."""
    fitted = _fitting(config)
    return replace(_with_dtype(config, fitted), hw=fitted.hw)


def _with_dtype(config: Config, fitted: Fit) -> Config:
    """What `auto` means depends on the hardware, and completions depend on it: so it is frozen as a fact."""
    return replace(config, model=replace(config.model, dtype=fitted.dtype))


def _fitting(config: Config) -> Fit:
    fitted = fit(config)
    if not fitted.memory.fits:
        raise ConfigError(fitted.memory.explain())
    return fitted


def freeze(config: Config) -> RunDir:
    """Creates the run of a request, or finds that it exists and is the same. Raises ConfigError when it is another.

    What could only fail on a GPU node otherwise is tried first: memory, tokenizer, templates, the format of the weights.
    """
    inputs = scan_shards(config.input.paths)
    columns = check_columns(inputs.schema, config)
    fitted = _fitting(config)
    _prompt_builder(config, fitted)
    config = _with_dtype(config, fitted)
    run_dir = RunDir(Path(str(config.output.dir)).absolute())
    request = request_of(config, inputs.shards, inputs.schema)
    if config.model.load_format == "safetensors" and request["model.weights_headers"] is None:
        raise ConfigError(
            f"model.path={config.model.path}: holds no *.safetensors file, and weights of no other format can be loaded"
        )
    if run_dir.manifest_json.exists():
        manifest = Manifest.load(run_dir)
        _same_units(config, manifest)
        manifest.require_same(request)
    else:
        units = cut_units(inputs.shards, config.input.rows_per_unit, config.input.limit)
        Manifest.create(run_dir, config, inputs, columns, units, request)
    return run_dir


def _same_units(config: Config, manifest: Manifest) -> None:
    frozen = manifest.config.input.rows_per_unit
    if config.input.rows_per_unit != frozen:
        raise ConfigError(f"input.rows_per_unit={config.input.rows_per_unit}: must stay {frozen}, as this run's units were cut")


@dataclass(frozen=True)
class TokenEstimate:
    """Prompt tokens of a whole input, from `sampled` of its rows; `counted` by the tokenizer, else guessed from their bytes."""

    total: int
    sampled: int
    counted: bool


def estimate_prompt_tokens(config: Config, inputs: InputSet, units: Sequence[Unit], fitted: Fit) -> TokenEstimate:
    """Reads a few rows at evenly spaced places and scales their tokens up."""
    columns = columns_needed(config.input, inputs.schema)
    places = list(_sample_places(units))
    if not places:
        return TokenEstimate(0, 0, True)
    reader = UnitReader(inputs.root, inputs.shards, columns)
    table = pa.concat_tables([reader.read((place,)) for place in places])
    keys = [(inputs.shards[place.shard].path, row) for place in places for row in range(place.start, place.stop)]
    counted = _count_tokens(config, fitted, table, keys)
    tokens = table.nbytes // BYTES_PER_TOKEN if counted is None else counted
    total = sum(num_rows(unit) for unit in units)
    return TokenEstimate(round(tokens / len(keys) * total), len(keys), counted is not None)


def _sample_places(units: Sequence[Unit]) -> Iterator[RowRange]:
    count = min(SAMPLE_PLACES, len(units))
    for unit in (units[i * len(units) // count] for i in range(count)):
        yield replace(unit[0], stop=min(unit[0].stop, unit[0].start + SAMPLE_ROWS))


def _count_tokens(config: Config, fitted: Fit, table: pa.Table, keys: Sequence[tuple[str, int]]) -> int | None:
    """Prompt tokens of the sampled rows as the run will see them; None for text without a tokenizer."""
    if config.model.path is None and config.input.token_ids_column is None:
        return None
    return sum(row.num_prompt_tokens for row in _prompt_builder(config, fitted).prepare(table, keys))


def _prompt_builder(config: Config, fitted: Fit) -> PromptBuilder:
    """As a replica will make it. Raises ConfigError for what is missing or malformed."""
    template = ChatTemplate.load(config.model.path, config.model.chat_template)
    shape = fitted.shape
    return PromptBuilder(config, load_tokenizer(config), template, fitted.max_model_len, shape.vocab_size, shape.eos_token_ids)


@dataclass(frozen=True)
class PlanReport:
    """What `plan` prints."""

    config: Config
    fitted: Fit
    shards: int
    rows: int
    units: int
    prompt_tokens: TokenEstimate

    @property
    def replicas_per_node(self) -> int:
        return self.fitted.hw.gpus_per_node // int(self.fitted.hw.tensor_parallel)

    @property
    def completion_tokens(self) -> int:
        """Of all samples, at full length."""
        return self.rows * self.config.sampling.n * self.config.sampling.max_tokens

    @property
    def seconds_at_least(self) -> float | None:
        """What the hardware's peak arithmetic takes, with every completion of full length; None where no peak is known.

        2 operations a parameter and token (Kaplan et al. 2020, section 2.1) and once a row's prompt; without attention.
        """
        facts = hardware.GPUS.get(self.fitted.hw.gpu or "")
        if facts is None:
            return None
        tokens = self.prompt_tokens.total + self.completion_tokens
        gpus = self.config.launcher.nodes * self.fitted.hw.gpus_per_node
        return 2 * self.fitted.shape.num_parameters() * tokens / (gpus * facts.tflops * 1e12)

    def lines(self) -> list[tuple[str, str]]:
        """(what, how much) in the order of reading."""
        lines = [*self._work(), *self._layout(), *self._memory(), *self._time()]
        return [(what, how_much) for what, how_much in lines if how_much]

    def _work(self) -> list[tuple[str, str]]:
        tokens, n = self.prompt_tokens, self.config.sampling.n
        how = "" if tokens.counted else f", guessed at {BYTES_PER_TOKEN} bytes a token: no tokenizer"
        return [
            ("run directory", str(self.config.output.dir)),
            ("input", f"{_count(self.rows, 'row')} of {_count(self.shards, 'shard')} in {_count(self.units, 'unit')}"),
            ("samples", "" if n == 1 else f"{self.rows * n:,}, {n:,} of each row, which share its prompt"),
            ("prompt tokens", f"about {tokens.total:,} (from {_count(tokens.sampled, 'row')}{how})"),
            ("completion tokens", f"at most {self.completion_tokens:,}"),
        ]

    def _layout(self) -> list[tuple[str, str]]:
        hw, nodes = self.fitted.hw, self.config.launcher.nodes
        what = f"{hw.gpu} ({hw.interconnect or 'no link'})" if hw.gpu else "CPU process"
        replicas = _count(nodes * self.replicas_per_node, "replica")
        return [
            ("hardware", f"{_count(nodes, 'node')} of {hw.gpus_per_node:,} x {what}"),
            ("layout", f"{replicas} of {_count(int(hw.tensor_parallel), 'rank')} (hw.tensor_parallel)"),
        ]

    def _memory(self) -> list[tuple[str, str]]:
        memory = self.fitted.memory
        return [
            (
                "model",
                f"{self.fitted.shape.num_parameters():,} parameters in {self.fitted.dtype}, "
                f"sequences of up to {memory.max_model_len:,} tokens",
            ),
            (
                "memory of a rank",
                f"at most {gib(memory.usable_bytes)} of {gib(memory.device_bytes)}: "
                f"weights {gib(memory.weight_bytes)}, "
                f"working memory {gib(memory.activation_bytes + memory.overhead_bytes)}, "
                f"KV cache {gib(memory.kv_bytes)}",
            ),
            (
                "KV cache",
                f"{memory.kv_tokens:,} tokens in {memory.num_blocks:,} blocks: "
                f"{memory.concurrent_sequences:,} sequences of full length at once",
            ),
        ]

    def _time(self) -> list[tuple[str, str]]:
        seconds = self.seconds_at_least
        if seconds is None:
            return []
        gpu_hours = seconds / 3600 * self.config.launcher.nodes * self.fitted.hw.gpus_per_node
        return [("time", f"at least {_duration(seconds)}, {gpu_hours:,.2f} GPU-hours (peak arithmetic, full completions)")]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((3600, "hours"), (60, "minutes")) if seconds >= 2 * size), (1, "seconds"))
    return f"{seconds / size:,.1f} {unit}"


def plan_report(config: Config) -> PlanReport:
    """Looks at the input and the model and works out the rest. Raises ConfigError, but not for what does not fit."""
    inputs = scan_shards(config.input.paths)
    check_columns(inputs.schema, config)
    fitted = fit(config)
    units = cut_units(inputs.shards, config.input.rows_per_unit, config.input.limit)
    return PlanReport(
        config,
        fitted,
        len(inputs.shards),
        sum(num_rows(unit) for unit in units),
        len(units),
        estimate_prompt_tokens(config, inputs, units, fitted),
    )
