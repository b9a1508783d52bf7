"""The request of a run as typed values: every key, its default, what it changes, and what it accepts.

This module owns the schema. YAML under `conf/` only supplies values, Hydra only composes them (see `compose.py`), and the
data plane reads the frozen result from the manifest: so nothing here knows Hydra, torch or SLURM. Each key is classed as
RESULT (it changes completions), SCHEMA (it changes output columns) or THROUGHPUT (it changes neither, so a run may be
resumed with another value). RESULT and SCHEMA keys make the run's fingerprint. `model.path` and `input.paths` say where
content lies; the content itself is fingerprinted, so a run survives a move.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from batchinfer.checks import ConfigError as ConfigError
from batchinfer.checks import check_range, typed
from batchinfer.checks import show as show
from batchinfer.checks import unknown_key as unknown_key

RESULT, SCHEMA, THROUGHPUT = "result", "schema", "throughput"


def _key(default: Any, kind: str, help: str, **checks: Any) -> Any:
    """A config field. `checks`: choices=(...), minimum=, maximum=, above= (exclusive), each=(...) (what the items
    of a list may be).

    as_json=True: a mapping is kept as JSON text, because the order of its names matters and must survive in the fingerprint.
    """
    metadata = {"kind": kind, "help": help, **checks}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, in which arithmetic."""

    path: str | None = _key(None, THROUGHPUT, "checkpoint folder in Hugging Face form (its content is fingerprinted)")
    dtype: str = _key(
        "auto",
        RESULT,
        "arithmetic; auto: the checkpoint's (float32 on a CPU)",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
    )
    max_model_len: int | None = _key(None, RESULT, "longest prompt + completion in tokens; default: the checkpoint's", minimum=2)
    chat_template: str | None = _key(
        None, RESULT, "in place of the checkpoint's chat template: a file, jinja2 text, or the name of one of its templates"
    )
    load_format: str = _key(
        "safetensors", RESULT, "random: seeded weights of the right shapes, no checkpoint", choices=("safetensors", "random")
    )
    architecture: dict[str, Any] = _key({}, RESULT, "fields of a Hugging Face config.json; a checkpoint's own config wins")


@dataclass(frozen=True)
class HardwareConfig:
    """A hardware tier: what one node has, and what SLURM and NCCL must be told for it."""

    gpu: str | None = _key(None, THROUGHPUT, "GPU name from hardware.GPUS; null: processes on the CPU; auto: this host's")
    gpus_per_node: int = _key(1, THROUGHPUT, "GPUs of a node (processes, when gpu is null)", minimum=1)
    tensor_parallel: int | str = _key("auto", THROUGHPUT, "ranks of one replica: a number, or auto")
    nodes_per_replica: int = _key(1, THROUGHPUT, "nodes that one replica spans, with all their GPUs", minimum=1)
    interconnect: str | None = _key(None, THROUGHPUT, "nvlink, pcie or null", choices=("nvlink", "pcie", None))
    cpus_per_gpu: int | None = _key(None, THROUGHPUT, "CPU cores for each rank; default: this host's cores shared out", minimum=1)
    mem_gb: int | None = _key(None, THROUGHPUT, "host memory to ask SLURM for, per node", minimum=1)
    modules: list[str] = _key([], THROUGHPUT, "environment modules to load in a SLURM job")
    env: dict[str, Any] = _key({}, THROUGHPUT, "environment variables for every rank (NCCL and others)")


@dataclass(frozen=True)
class InputConfig:
    """Which rows, and how a row becomes a prompt."""

    paths: list[str] = _key([], THROUGHPUT, "Parquet files, folders or globs (their content is fingerprinted)")
    prompt_column: str | None = _key(None, RESULT, "column of prompt text")
    messages_column: str | None = _key(None, RESULT, "column of chat messages: list of structs, or JSON text")
    token_ids_column: str | None = _key(None, RESULT, "column of token ids: list of integers, taken as they are")
    prompt_template: str | None = _key(None, RESULT, "jinja2 text over the row's columns that makes the prompt")
    system_prompt: str | None = _key(None, RESULT, "system message put before every chat that has none")
    apply_chat_template: bool = _key(False, RESULT, "render a plain prompt as one user message")
    chat_template_kwargs: dict[str, Any] = _key(
        {}, RESULT, "variables for the chat template; continue_final_message=true: the model goes on with an assistant's last one"
    )
    sampling_column: str | None = _key(None, RESULT, "column (struct or JSON text) that overrides sampling keys for its row")
    rows_per_unit: int = _key(1024, THROUGHPUT, "rows claimed, committed and retried together; frozen with the plan", minimum=1)
    limit: int | None = _key(None, RESULT, "run only the first so many rows", minimum=1)
    too_long: str = _key(
        "error",
        RESULT,
        "what to do with a prompt that leaves no room for a token",
        choices=("error", "truncate_left", "truncate_right"),
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; `input.sampling_column` overrides these for single rows."""

    temperature: float = _key(0.0, RESULT, "0 is greedy", minimum=0)
    top_p: float = _key(1.0, RESULT, "smallest set of tokens with this probability", above=0, maximum=1)
    top_k: int = _key(0, RESULT, "the k likeliest tokens; 0: all", minimum=0)
    min_p: float = _key(0.0, RESULT, "tokens of at least this share of the likeliest one's probability", minimum=0, maximum=1)
    max_tokens: int = _key(128, RESULT, "tokens to generate at most, cut to what max_model_len leaves", minimum=1)
    min_tokens: int = _key(0, RESULT, "tokens before any stop is looked at", minimum=0)
    stop: list[str] = _key([], RESULT, "strings that end a completion; they are not part of it")
    stop_token_ids: list[int] = _key([], RESULT, "token ids that end a completion, beside the model's own")
    ignore_eos: bool = _key(False, RESULT, "go on past the model's end-of-sequence token")
    seed: int | None = _key(None, RESULT, "default: the run's seed")
    n: int = _key(1, RESULT, "samples a row", minimum=1, maximum=16_384)
    repetition_penalty: float = _key(1.0, RESULT, "divides the logits of tokens seen before (negative ones: multiplies)", above=0)
    presence_penalty: float = _key(
        0.0, RESULT, "subtracted once from the logits of tokens generated before", minimum=-2, maximum=2
    )
    frequency_penalty: float = _key(
        0.0, RESULT, "subtracted from the logits of tokens generated before, as often as they were", minimum=-2, maximum=2
    )
    logprobs: int | None = _key(
        None, SCHEMA, "log-probabilities of the chosen token and the k likeliest, as a column", minimum=0, maximum=128
    )
    prompt_logprobs: int | None = _key(None, SCHEMA, "the same for the prompt's tokens", minimum=0, maximum=128)
    json_schema: str | dict[str, Any] | None = _key(
        None, RESULT, "JSON schema that the completion must satisfy: a mapping, JSON text or a file", as_json=True
    )
    regex: str | None = _key(None, RESULT, "regular expression that the whole completion must match (Rust's syntax)")
    choice: list[str] | None = _key(None, RESULT, "texts of which the completion is one")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine uses its GPU. None of it changes a completion beyond rounding."""

    block_size: int = _key(16, THROUGHPUT, "tokens in a block of the KV cache", minimum=1)
    max_num_seqs: int = _key(512, THROUGHPUT, "sequences running at once", minimum=1)
    max_num_batched_tokens: int = _key(2048, THROUGHPUT, "tokens of one step, prefill and decode together", minimum=1)
    gpu_memory_utilization: float = _key(0.9, THROUGHPUT, "share of the GPU's memory to use", above=0, maximum=1)
    prefix_caching: bool = _key(True, THROUGHPUT, "share the KV of equal prompt beginnings")
    cuda_graphs: bool = _key(True, THROUGHPUT, "replay captured steps of few tokens (where our kernels attend)")
    peer_memory: bool = _key(
        True, THROUGHPUT, "sum over ranks through memory that GPUs map of each other, where they can; else NCCL"
    )
    overlap: bool = _key(True, THROUGHPUT, "launch the next step before the tokens of this one are read")
    attention_backend: str = _key(
        "auto",
        THROUGHPUT,
        "auto: kernels on a GPU; reference: plain torch for everything; fused_softmax: scores in memory and one kernel over them",
        choices=("auto", "reference", "fused_softmax"),
    )
    check_ranks: bool = _key(False, THROUGHPUT, "debug: compare batch, hidden states and tokens of all ranks in every step")
    stall_timeout_s: float = _key(
        300.0, THROUGHPUT, "a replica that stands still this long is killed, and loses its claims", above=0
    )


@dataclass(frozen=True)
class LauncherConfig:
    """Where the jobs run."""

    kind: str = _key(
        "auto",
        THROUGHPUT,
        "auto, local (submitit on this host), slurm, or inline (this process)",
        choices=("auto", "local", "slurm", "inline"),
    )
    nodes: int = _key(1, THROUGHPUT, "nodes of the array, each a job (hw.nodes_per_replica of them)", minimum=1)
    timeout_min: int = _key(1440, THROUGHPUT, "time limit of a job in minutes", minimum=1)
    partition: str | None = _key(None, THROUGHPUT, "SLURM partition")
    account: str | None = _key(None, THROUGHPUT, "SLURM account")
    qos: str | None = _key(None, THROUGHPUT, "SLURM quality of service")
    constraint: str | None = _key(None, THROUGHPUT, "SLURM node features")
    reservation: str | None = _key(None, THROUGHPUT, "SLURM reservation")
    array_parallelism: int | None = _key(None, THROUGHPUT, "jobs of the array that run at once; default: all", minimum=1)
    setup: list[str] = _key([], THROUGHPUT, "shell lines to run on the node before the job")
    signal_delay_s: int = _key(120, THROUGHPUT, "seconds of warning before the time limit", minimum=1)
    max_requeues: int = _key(100, THROUGHPUT, "how often a submission's jobs together may be put back into the queue", minimum=0)
    wait: bool = _key(True, THROUGHPUT, "stay and show the progress; false: submit and return")
    extra: dict[str, Any] = _key({}, THROUGHPUT, "further sbatch options, by their long names")


@dataclass(frozen=True)
class OutputConfig:
    """What a row of output carries and where it goes."""

    dir: str | None = _key(None, THROUGHPUT, "run directory; default: outputs/<run_name>")
    keep_columns: list[str] | str = _key("all", SCHEMA, "input columns to carry over: all, none or a list")
    token_ids: bool = _key(False, SCHEMA, "add the completion's token ids")
    prefix: str = _key("", SCHEMA, "put before our column names")
    compression: str = _key("zstd", THROUGHPUT, "Parquet compression", choices=("zstd", "snappy", "gzip", "lz4", "none"))


BENCH_WORKLOADS = ("custom", "mixed", "shared", "long_out", "single")
BENCH_PEERS = ("hf", "vllm")


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` measures. Runs do not look at it."""

    workload: list[str] = _key(["custom"], THROUGHPUT, "what to run: one or a list", each=BENCH_WORKLOADS)
    num_requests: int = _key(64, THROUGHPUT, "custom: how many requests", minimum=1)
    input_len: int | list[int] = _key([32, 128], THROUGHPUT, "custom: tokens of a prompt: a number, or [lowest, highest]")
    output_len: int | list[int] = _key([16, 64], THROUGHPUT, "custom: tokens to generate: a number, or [lowest, highest]")
    shared_prefix_len: int = _key(0, THROUGHPUT, "custom: tokens that all prompts begin with, before their own", minimum=0)
    requests: str | None = _key(None, THROUGHPUT, "Parquet of requests in place of bench.workload: token_ids, max_tokens")
    repeat: int = _key(1, THROUGHPUT, "timed repetitions, of which the median counts", minimum=1)
    warmup: int = _key(16, THROUGHPUT, "requests of each workload that run before it, untimed", minimum=0)
    peers: list[str] | None = _key(None, THROUGHPUT, "run beside it; default: those that are installed", each=BENCH_PEERS)
    peer_s: float = _key(60.0, THROUGHPUT, "seconds after which hf is stopped in a workload, and the rest extrapolated", above=0)


@dataclass(frozen=True)
class ProfileConfig:
    """What `profile` runs and leaves behind. No run depends on it."""

    dir: str | None = _key(None, THROUGHPUT, "folder for the trace; default: outputs/profile-<model>")
    workload: str = _key(
        "mixed",
        THROUGHPUT,
        "steady state to look at: rows that end while others begin (mixed), that only decode, or only prefill",
        choices=("mixed", "decode", "prefill"),
    )
    num_seqs: int | None = _key(None, THROUGHPUT, "sequences at once; default: engine.max_num_seqs", minimum=1)
    prompt_tokens: int | None = _key(
        None, THROUGHPUT, "mean length of a prompt, drawn evenly from 1/8 to 15/8 of it; default: 544 if they fit", minimum=8
    )
    output_tokens: int | None = _key(
        None, THROUGHPUT, "mean length of a completion, drawn likewise; default: 288 if they fit", minimum=8
    )
    shared_prefix_len: int = _key(0, THROUGHPUT, "tokens that all prompts begin with, before their own", minimum=0)
    warmup_steps: int = _key(10, THROUGHPUT, "steps before, when every sequence is running", minimum=1)
    steps: int = _key(20, THROUGHPUT, "steps in the trace", minimum=1)
    nsys: bool = _key(False, THROUGHPUT, "record with Nsight Systems instead of torch.profiler")
    memory_snapshot: bool = _key(False, THROUGHPUT, "also leave every allocation of GPU memory, for pytorch.org/memory_viz")


@dataclass(frozen=True)
class RetryConfig:
    """What `retry` runs again."""

    codes: list[str] = _key([], THROUGHPUT, "error codes whose rows to run again; default: all")


@dataclass(frozen=True)
class ExportConfig:
    """What `export` writes."""

    format: str = _key("parquet", THROUGHPUT, "of the files", choices=("parquet", "jsonl"))
    incomplete: bool = _key(False, THROUGHPUT, "export a run of which rows are missing, without them")


@dataclass(frozen=True)
class Config:
    """One request, complete and checked. Built by `from_dict`, frozen into the manifest by `to_dict`."""

    run_name: str | None = _key(None, THROUGHPUT, "name of the run; default: <model>-<fingerprint>")
    seed: int = _key(0, RESULT, "seed of every random choice")
    stats_every: int = _key(1, THROUGHPUT, "write batch statistics of every so many steps as one row", minimum=1)
    max_error_fraction: float = _key(
        1.0, THROUGHPUT, "a larger share of error rows in the output gives exit code 1", minimum=0, maximum=1
    )
    verbose: bool = _key(False, THROUGHPUT, "show what the replicas log")
    model: ModelConfig = field(default_factory=ModelConfig)
    hw: HardwareConfig = field(default_factory=HardwareConfig)
    input: InputConfig = field(default_factory=InputConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested as the YAML is: `from_dict(config.to_dict()) == config`."""
        return dataclasses.asdict(self)


def leaves(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key of the schema as (dotted name, dataclass field)."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf by its dotted name, in the order of the schema."""
    return {name: _lookup(config, name) for name, _ in leaves()}


def _lookup(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def from_dict(raw: Mapping[str, Any], planning: bool = False) -> Config:
    """The checked config of nested plain values; left-out keys take their defaults. Raises ConfigError.

    `planning`: no weights will be loaded, so model.architecture alone says enough about the model.
    """
    config: Config = build_group(Config, raw, "")
    check_together(config, planning)
    return config


def build_group(cls: type, raw: Any, prefix: str) -> Any:
    """One group of keys, `prefix` its dotted name with the dot, from plain values. Raises ConfigError."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{show(prefix[:-1], raw)}: must be a group of keys: {', '.join(f.name for f in fields(cls))}")
    names = [f.name for f in fields(cls)]
    for key in raw:
        if key not in names:
            raise unknown_key(f"{prefix}{key}", prefix, names)
    hints = _hints(cls)
    return cls(**{f.name: _value(f, hints[f.name], raw[f.name], prefix + f.name) for f in fields(cls) if f.name in raw})


@functools.cache  # rows with sampling of their own ask again and again
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(f: dataclasses.Field[Any], hint: Any, raw: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build_group(typing.cast(type, hint), raw, name + ".")
    value = typed(hint, raw, name)
    if f.metadata.get("as_json") and isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    check_range(f.metadata, value, name)
    return value


PROMPT_SOURCES = ("prompt_column", "messages_column", "token_ids_column", "prompt_template")


def check_together(config: Config, planning: bool = False) -> None:
    """The rules that join several keys. Raises ConfigError."""
    if config.run_name is not None and not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*", config.run_name):
        raise ConfigError(f"{show('run_name', config.run_name)}: must be letters, digits, '.', '_' and '-', not dots alone")
    _check_model(config.model, config.hw, planning)
    _check_hw(config.hw)
    if config.launcher.nodes % config.hw.nodes_per_replica:
        nodes, span = show("launcher.nodes", config.launcher.nodes), show("hw.nodes_per_replica", config.hw.nodes_per_replica)
        raise ConfigError(f"{nodes}: must be a multiple of {span}")
    _check_input(config.input)
    check_sampling(config.sampling)
    _check_bench(config.bench)
    if isinstance(config.output.keep_columns, str) and config.output.keep_columns not in ("all", "none"):
        raise ConfigError(f"{show('output.keep_columns', config.output.keep_columns)}: must be all, none or a list of columns")


GRAMMARS = ("json_schema", "regex", "choice")  # of these at most one says what a completion must look like


def check_sampling(sampling: SamplingConfig) -> None:
    """The rules that join sampling keys, for the config and for single rows. Raises ConfigError.

    Whether a grammar means anything is found where it is compiled (`data.grammar`).
    """
    if sampling.min_tokens > sampling.max_tokens:
        raise ConfigError(
            f"{show('sampling.min_tokens', sampling.min_tokens)}: must be at most "
            f"{show('sampling.max_tokens', sampling.max_tokens)}"
        )
    given = [f"sampling.{name}" for name in GRAMMARS if getattr(sampling, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: at most one of them may be set")
    if sampling.choice == []:
        raise ConfigError("sampling.choice=[]: must name at least one string")
    if "" in sampling.stop:
        raise ConfigError(f"{show('sampling.stop', sampling.stop)}: a stop string must not be empty")


def _check_model(model: ModelConfig, hw: HardwareConfig, planning: bool) -> None:
    if model.load_format == "safetensors" and model.path is None and not (planning and model.architecture):
        raise ConfigError("model.path=null: must name a checkpoint folder, unless model.load_format=random")
    if model.load_format == "random" and model.path is None and not model.architecture:
        raise ConfigError("model.load_format=random: needs model.architecture or model.path, for the shapes of the weights")
    if model.dtype == "float64" and hw.gpu not in (None, "auto"):
        raise ConfigError(f"model.dtype=float64: must run on a CPU (hw=cpu), not on {show('hw.gpu', hw.gpu)}")


def _check_hw(hw: HardwareConfig) -> None:
    parallel = hw.tensor_parallel
    if isinstance(parallel, str):
        if parallel != "auto":
            raise ConfigError(f"{show('hw.tensor_parallel', parallel)}: must be auto or an integer of at least 1")
    elif hw.nodes_per_replica > 1 and parallel != hw.nodes_per_replica * hw.gpus_per_node:
        raise ConfigError(
            f"{show('hw.tensor_parallel', parallel)}: must be auto or {hw.nodes_per_replica * hw.gpus_per_node}, all GPUs of the "
            f"hw.nodes_per_replica={hw.nodes_per_replica} nodes"
        )
    elif hw.nodes_per_replica == 1 and (parallel < 1 or hw.gpus_per_node % parallel):
        raise ConfigError(f"{show('hw.tensor_parallel', parallel)}: must be auto or divide hw.gpus_per_node={hw.gpus_per_node}")
    for name, value in hw.env.items():
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{show(f'hw.env.{name}', value)}: must be text or a number")


def _check_input(source: InputConfig) -> None:
    if not source.paths:
        raise ConfigError("input.paths=[]: must name at least one Parquet file, folder or glob")
    given = [name for name in PROMPT_SOURCES if getattr(source, name) is not None]
    if len(given) != 1:
        found = " and ".join(show(f"input.{name}", getattr(source, name)) for name in given) or "none of them is set"
        raise ConfigError(f"{found}: exactly one of {', '.join(f'input.{name}' for name in PROMPT_SOURCES)} must be set")
    if source.apply_chat_template and given[0] not in ("prompt_column", "prompt_template"):
        raise ConfigError(
            f"input.apply_chat_template=true: must go with input.prompt_column or input.prompt_template, "
            f"not with input.{given[0]}"
        )
    if source.system_prompt is not None and given[0] != "messages_column" and not source.apply_chat_template:
        raise ConfigError(
            f"{show('input.system_prompt', source.system_prompt)}: must go with input.messages_column or "
            "input.apply_chat_template=true"
        )


def _check_bench(bench: BenchConfig) -> None:
    if not bench.workload:
        raise ConfigError(f"bench.workload=[]: must name at least one of {', '.join(BENCH_WORKLOADS)}")
    for name in ("input_len", "output_len"):
        value = getattr(bench, name)
        low, *rest = [value] if isinstance(value, int) else value or [0]
        if low < 1 or len(rest) > 1 or (rest and rest[0] < low):
            raise ConfigError(f"{show(f'bench.{name}', value)}: must be a number of at least 1, or [lowest, highest]")
