"""What a request comes to: units of work, the layout of a node, memory and time; and the frozen plan that a run starts from.

Everything here is known from the config, Parquet footers and a few hundred sampled rows: no GPU, no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchinfer.config import Config, ConfigError, HardwareConfig, ModelConfig, show
from batchinfer.data.prompts import check_columns
from batchinfer.data.reader import InputSet, scan_shards
from batchinfer.data.schema import RowRange, Shard, Unit
from batchinfer.job.demand import Sampled, prompt_builder, sample_input
from batchinfer.job.layout import Layout, choose, layouts, resolve_gpu
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.room import check_room
from batchinfer.job.rundir import RunDir
from batchinfer.memory import MemoryPlan, max_model_len
from batchinfer.model.checkpoint import check_files
from batchinfer.model.config import ModelShape, load_shape, resolve_dtype
from batchinfer.prediction import Demand

TAIL_SHARE = 4  # a unit holds at most a quarter of what is left, so that the last ones are small,
REPLICA_SHARE = 2  # and at most half of what is left for each replica, so that none is still at a large one when others end
SMALLEST_SHARE = 8  # but not less than an eighth of rows_per_unit


def cut_units(shards: Sequence[Shard], rows_per_unit: int, limit: int | None, replicas: int = 1) -> tuple[Unit, ...]:
    """Cuts the first `limit` rows into units of at most `rows_per_unit` rows, in input order, each row once.

    A unit is one range of one shard; shards smaller than it share one, and so does a rest of a shard of less than half a unit.
    Towards the end units shrink with what is left, the sooner the more `replicas` there are to share it, down to an eighth of
    `rows_per_unit`: so replicas finish together. Linear in shards and units.
    """
    share = max(TAIL_SHARE, REPLICA_SHARE * replicas)
    total = sum(shard.num_rows for shard in shards)
    left = total if limit is None else min(limit, total)
    units: list[Unit] = []
    ranges: list[RowRange] = []
    space = target = _unit_size(left, rows_per_unit, share)
    for number, shard in enumerate(shards):
        start, stop = 0, min(shard.num_rows, left)
        if stop > space and space <= target // 2:
            units.append(tuple(ranges))
            ranges, space = [], (target := _unit_size(left, rows_per_unit, share))
        while start < stop:
            taken = min(space, stop - start)
            ranges.append(RowRange(number, start, start + taken))
            start, left, space = start + taken, left - taken, space - taken
            if space == 0:
                units.append(tuple(ranges))
                ranges, space = [], (target := _unit_size(left, rows_per_unit, share))
    return tuple([*units, tuple(ranges)] if ranges else units)


def _unit_size(left: int, rows_per_unit: int, share: int) -> int:
    smallest = max(1, rows_per_unit // SMALLEST_SHARE)
    return min(rows_per_unit, max(smallest, left // share))


def _most_replicas(config: Config) -> int:
    """That this submission may have: the layout is chosen by a sample of the units, so they are cut before it is known."""
    hw, nodes = config.hw, config.launcher.nodes
    if hw.nodes_per_replica > 1:
        return nodes // hw.nodes_per_replica
    return nodes * hw.gpus_per_node // (1 if hw.tensor_parallel == "auto" else int(hw.tensor_parallel))


@dataclass(frozen=True)
class Fit:
    """The model on the hardware: everything that said `auto`, as facts. `layouts`: all that a node has, `chosen` among them."""

    shape: ModelShape
    dtype: str
    max_model_len: int
    layouts: tuple[Layout, ...]
    chosen: Layout

    @property
    def hw(self) -> HardwareConfig:
        return self.chosen.hw

    @property
    def memory(self) -> MemoryPlan:
        return self.chosen.memory


def fit(config: Config, demand: Demand | None = None) -> Fit:
    """Resolves hardware, dtype and length; chooses the layout that is best for `demand`, or for a standard work.

    Raises ConfigError for what cannot be, but not for what does not fit.
    """
    shape = load_shape(config.model)
    found = layouts(config, shape, demand)
    chosen = choose(config.hw, found)
    dtype = resolve_dtype(config.model.dtype, shape, chosen.hw.gpu is not None)
    return Fit(shape, dtype, max_model_len(config.model, shape), tuple(found), chosen)


def resolved(config: Config) -> Config:
    """The config as it runs where no input matters: hardware and dtype as facts. Raises ConfigError when it does not fit."""
    return _facts(config, fit(config))


def _facts(config: Config, fitted: Fit) -> Config:
    return replace(_with_dtype(config, _require_fit(fitted)), hw=fitted.hw)


def _with_dtype(config: Config, fitted: Fit) -> Config:
    """What `auto` means depends on the hardware, and completions depend on it: so it is frozen as a fact."""
    return replace(config, model=replace(config.model, dtype=fitted.dtype))


def _require_fit(fitted: Fit) -> Fit:
    if not fitted.memory.fits:
        raise ConfigError(fitted.memory.explain())
    return fitted


@dataclass(frozen=True)
class Plan:
    """A request looked at: its input and units, and how it lies on the hardware. `sampled`: None where nobody wants to know."""

    config: Config
    inputs: InputSet
    columns: list[str]  # input columns to carry over
    units: tuple[Unit, ...]
    sampled: Sampled | None
    fitted: Fit

    def submission(self) -> Config:
        """The config of one submission: hardware and dtype as facts. Raises ConfigError when the model does not fit."""
        return _facts(self.config, self.fitted)

    def expected(self) -> dict[str, Any] | None:
        """This submission's time and memory as predicted, for the report to compare; None where nothing is predicted."""
        chosen = self.fitted.chosen
        if chosen.prediction is None:
            return None
        memory = {"kv_tokens": chosen.memory.kv_tokens, "gpu_memory_bytes": chosen.memory.total_bytes}
        facts = {"gpu": chosen.hw.gpu, "ranks": chosen.ranks, "block_size": chosen.memory.block_size}
        return {**chosen.prediction.to_dict(), **memory, **facts}


def make_plan(config: Config, sample: bool = False) -> Plan:
    """Looks at the input and the model and works out the rest. Raises ConfigError, but not for what does not fit.

    `sample`: read some rows even where no choice and no prediction depends on them (on a CPU).
    """
    inputs = scan_shards(config.input.paths)
    columns = check_columns(inputs.schema, config)
    units = cut_units(inputs.shards, config.input.rows_per_unit, config.input.limit, _most_replicas(config))
    sampled = None
    with _readable(config.model.path):
        if sample or resolve_gpu(config.hw).gpu is not None:
            sampled = sample_input(config, load_shape(config.model), inputs, units)
        return Plan(config, inputs, columns, units, sampled, fit(config, sampled.demand if sampled else None))


@contextlib.contextmanager
def _readable(model: str | None) -> Iterator[None]:
    """A file of the checkpoint that is there and cannot be read is the request's mistake."""
    try:
        yield
    except OSError as error:
        if model is None or error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(model):
            raise
        cannot = f"cannot read {error.filename} ({error.strerror})"
        raise ConfigError(f"{show('model.path', model)}: {cannot}; it must be a checkpoint folder that you may read") from error


def freeze(plan: Plan) -> RunDir:
    """Creates the run of a request, or finds that it exists and is the same. Raises ConfigError when it is another.

    What could only fail on a GPU node otherwise is tried first: memory, tokenizer, templates, the files of the weights, and
    whether the output folder can be written and has room.
    """
    config = _with_dtype(plan.config, _require_fit(plan.fitted))
    run_dir = RunDir(Path(str(config.output.dir)).absolute())
    with _readable(config.model.path):
        prompt_builder(config, plan.fitted.shape)
        request = request_of(config, plan.inputs.shards, plan.inputs.schema)
        _check_weights(config.model, request)
    check_room(run_dir.root)
    if run_dir.manifest_json.exists():
        manifest = Manifest.load(run_dir)
        _same_units(config, manifest)
        manifest.require_same(request)
    else:
        Manifest.create(run_dir, config, plan.inputs, plan.columns, plan.units, request)
    return run_dir


def _check_weights(model: ModelConfig, request: dict[str, Any]) -> None:
    if model.load_format != "safetensors":
        return
    if request["model.weights_headers"] is None:
        raise ConfigError(f"model.path={model.path}: holds no *.safetensors file, and weights of no other format can be loaded")
    check_files(Path(str(model.path)))


def _same_units(config: Config, manifest: Manifest) -> None:
    frozen = manifest.config.input.rows_per_unit
    if config.input.rows_per_unit != frozen:
        raise ConfigError(f"input.rows_per_unit={config.input.rows_per_unit}: must stay {frozen}, as this run's units were cut")
