"""Forward passes captured as CUDA graphs: a step of few tokens is launched at once, not kernel by kernel.

One graph for each of some numbers of tokens; a step replays the smallest that it fits, padded. What the tokens are (decode rows,
chunks, any mixture) is said by the buffer that the graph reads. Only whether there are tiles (`ops.attention_plan`: chunks, or
prefixes that rows share) makes a difference, since launching kernels for nothing costs a small step too much.

All graphs read the same buffer and share one memory pool: they are captured from large to small, so that smaller ones fit into
the memory of larger ones, and never run side by side.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch

from batchinfer.engine.inputs import InputPacker, PackedInputs

GRAPH_TOKENS = 512  # up to here a step is short enough for its launches to count, whatever it consists of

Run = Callable[[PackedInputs, torch.Tensor], torch.Tensor]
Captured = tuple[torch.cuda.CUDAGraph, torch.Tensor]  # and the hidden states that it leaves


def graph_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[int]:
    """Numbers of tokens to capture: close together where they are small, since padding is computed like anything else."""
    limit = min(max(max_num_seqs, GRAPH_TOKENS), max_num_batched_tokens)
    sizes = [1, 2, 4, 8, *range(16, 257, 16), *range(256 + 32, limit, 32)]
    return [size for size in sizes if size < limit] + [limit]


class CudaGraphs:
    """The forward pass of one rank, captured.

    `run` launches it for packed inputs that lie in a tensor on the device, and returns hidden states.
    """

    def __init__(self, run: Run, packer: InputPacker, device: torch.device) -> None:
        self._run, self._packer, self._device = run, packer, device
        self._graphs: dict[tuple[int, bool], Captured] = {}
        self._sizes: list[int] = []
        self._buffer = torch.empty(0, dtype=torch.int32, device=device)

    def capture(self, sizes: list[int], num_block_table_words: int) -> None:
        """Capture every size, with tiles and without. Something must have run before, so that nothing is set up within."""
        self._sizes = sorted(sizes)
        words = len(self._packer.padding(self._sizes[-1], tiles=True).buffer) + num_block_table_words
        self._buffer = torch.zeros(words, dtype=torch.int32, device=self._device)
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        torch.cuda.synchronize(self._device)
        for size in reversed(self._sizes):
            for tiles in (True, False):
                if size > 1 or not tiles:  # a single token is a decode row
                    self._graphs[size, tiles] = self._capture(size, tiles, pool, stream)
        torch.cuda.synchronize(self._device)

    def _capture(self, size: int, tiles: bool, pool: Any, stream: torch.cuda.Stream) -> Captured:
        packed = self._packer.padding(size, tiles)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on
            hidden = self._run(packed, self._buffer)
            graph.capture_end()
        return graph, hidden

    def size_for(self, num_tokens: int) -> int | None:
        """The size that a step of so many tokens replays; None: it is too large for any."""
        index = bisect.bisect_left(self._sizes, num_tokens)
        return self._sizes[index] if index < len(self._sizes) else None

    def replay(self, packed: PackedInputs, num_tokens: int) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] of a step packed to one of the sizes; to be used before the next replay."""
        graph, hidden = self._graphs[packed.size, packed.has_tiles]
        self._buffer[: len(packed.buffer)].copy_(torch.from_numpy(packed.buffer).pin_memory(), non_blocking=True)
        graph.replay()
        return hidden[:num_tokens]
