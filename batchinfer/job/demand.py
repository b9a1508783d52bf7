"""What an input asks of an engine: lengths of prompts and completions, from a few hundred of its rows.

Rows are prepared as a replica will prepare them. Where text cannot be tokenised yet (a plan without a checkpoint) tokens are
guessed from bytes. How long completions will be nobody knows: each counts at its full length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchinfer.config import Config, ConfigError
from batchinfer.data.chat import ChatTemplate
from batchinfer.data.prompts import PreparedRow, PromptBuilder, columns_needed, load_tokenizer
from batchinfer.data.reader import InputSet, UnitReader
from batchinfer.data.schema import RowRange, Unit, num_rows
from batchinfer.memory import max_model_len
from batchinfer.model.config import ModelShape
from batchinfer.prediction import Demand
from batchinfer.roofline import Work, common_prefix

SAMPLE_PLACES, SAMPLE_ROWS = 8, 40  # rows are sampled at so many places, so many at each
BYTES_PER_TOKEN = 4  # of text, where no tokenizer is at hand; English is near it


@dataclass(frozen=True)
class Sampled:
    """`prompt_tokens` of a whole input, from `rows` of it; `counted` by the tokenizer, else guessed from their bytes."""

    prompt_tokens: int
    rows: int
    counted: bool
    demand: Demand


def sample_input(config: Config, shape: ModelShape, inputs: InputSet, units: Sequence[Unit]) -> Sampled:
    """Reads a few rows at evenly spaced places and scales them up. Raises ConfigError for rows that cannot be read."""
    places = list(_sample_places(units))
    if not places:
        return Sampled(0, 0, True, Demand(Work(0, (), ()), 0))
    table = _read(config, inputs, places)
    counted = config.model.path is not None or config.input.token_ids_column is not None
    if counted:
        keys = [(inputs.shards[place.shard].path, row) for place in places for row in range(place.start, place.stop)]
        prepared = prompt_builder(config, shape).prepare(table, keys)
        tokens, work = sum(row.num_prompt_tokens for row in prepared), work_of(prepared, config.engine.prefix_caching)
    else:
        prompts = [table.slice(i, 1).nbytes // BYTES_PER_TOKEN for i in range(len(table))]
        tokens, work = sum(prompts), _guessed_work(prompts, config, shape)
    scale = sum(num_rows(unit) for unit in units) / len(table)
    return Sampled(round(tokens * scale), len(table), counted, Demand(work, round(len(work.prompts) * scale)))


def _sample_places(units: Sequence[Unit]) -> Iterator[RowRange]:
    count = min(SAMPLE_PLACES, len(units))
    for unit in (units[i * len(units) // count] for i in range(count)):
        yield replace(unit[0], stop=min(unit[0].stop, unit[0].start + SAMPLE_ROWS))


def _read(config: Config, inputs: InputSet, places: Sequence[RowRange]) -> pa.Table:
    reader = UnitReader(inputs.root, inputs.shards, columns_needed(config.input, inputs.schema))
    try:
        return pa.concat_tables([reader.read((place,)) for place in places])
    except RuntimeError as error:  # damaged pages, a file that has just changed: one sentence that names it
        raise ConfigError(f"input.paths: {error}") from error


def work_of(rows: Iterable[PreparedRow], prefix_caching: bool) -> Work:
    """Of prepared rows, as full completions; those that are errors ask for nothing.

    Samples of a row after its first find its prompt computed, and read it together: they count as prompts of one token.
    """
    asking = [(row.token_ids, row.sampling.max_tokens, len(row.seeds)) for row in rows if row.token_ids and row.sampling]
    prefix = common_prefix([ids for ids, _, _ in asking]) if prefix_caching and len(asking) > 1 else 0
    prompts: list[int] = []
    completions: list[int] = []
    for ids, most, samples in asking:
        prompts += [len(ids) - prefix] + [1 if prefix_caching else len(ids)] * (samples - 1)
        completions += [most] * samples
    return Work(prefix, tuple(prompts), tuple(completions))


def _guessed_work(prompts: Sequence[int], config: Config, shape: ModelShape) -> Work:
    length, n = max_model_len(config.model, shape), config.sampling.n
    lengths = [min(max(1, tokens), length - 1) for tokens in prompts]
    again = [1 if config.engine.prefix_caching else tokens for tokens in lengths]
    rows = [tokens for first, other in zip(lengths, again, strict=True) for tokens in (first, *[other] * (n - 1))]
    most = [min(config.sampling.max_tokens, length - tokens) for tokens in lengths for _ in range(n)]
    return Work(0, tuple(rows), tuple(most))


def prompt_builder(config: Config, shape: ModelShape) -> PromptBuilder:
    """As a replica will make it. Raises ConfigError for what is missing or malformed."""
    template = ChatTemplate.load(config.model.path, config.model.chat_template)
    length = max_model_len(config.model, shape)
    return PromptBuilder(config, load_tokenizer(config), template, length, shape.vocab_size, shape.eos_token_ids)
