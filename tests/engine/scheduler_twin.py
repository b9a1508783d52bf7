"""The scheduler's policy once more, slow and obvious: plain lists, and everything counted again at every step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class TwinBlock:
    history: tuple[int, ...] | None = None  # all tokens up to this block's end, if it may be found by them


@dataclass(eq=False)
class TwinRow:
    request_id: int
    tokens: list[int]
    num_prompt: int
    limit: int  # tokens that it may have in the end
    wants_prompt_logprobs: bool = False
    computed: int = 0
    ever_computed: int = 0
    blocks: list[TwinBlock] = field(default_factory=list)


@dataclass
class TwinStep:
    chosen: list[tuple[int, int, int]] = field(default_factory=list)  # request id, first token, number of tokens
    preempted: list[int] = field(default_factory=list)
    prefix_hit_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(count for _, _, count in self.chosen)


class Twin:
    """`step` chooses like `Scheduler.schedule`; the caller does to `tokens` and `computed` what the engine would."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, prefix_caching: bool) -> None:
        self.block_size, self.max_num_seqs, self.budget, self.prefix_caching = block_size, max_num_seqs, budget, prefix_caching
        self.pool = [TwinBlock() for _ in range(num_blocks)]
        self.free = list(self.pool)  # taken from the left
        self.waiting: list[TwinRow] = []
        self.running: list[TwinRow] = []

    def row(self, request_id: int) -> TwinRow:
        return next(row for row in self.waiting + self.running if row.request_id == request_id)

    def step(self) -> TwinStep:
        step = TwinStep()
        for row in list(self.running):
            if row in self.running and len(row.tokens) == row.computed + 1 and len(row.tokens) < row.limit:
                while row in self.running and self.blocks_for(row) > len(row.blocks) + len(self.free):
                    ended = [other for other in self.running if len(other.tokens) == other.limit and other.blocks]
                    for other in ended:
                        self.give_back(other)
                    if not ended:
                        self.preempt([other for other in self.running if other.blocks][-1], step)
                if row in self.running:
                    self.fill(row)
                    step.chosen.append((row.request_id, row.computed, 1))
        for row in self.running:
            if len(row.tokens) > row.computed + 1:
                self.compute_some(row, step)
        while not step.preempted and self.waiting and self.room_for(self.waiting[0], step):
            self.admit(self.waiting[0], step)
        return step

    def blocks_for(self, row: TwinRow) -> int:
        return -(-len(row.tokens) // self.block_size)

    def preempt(self, row: TwinRow, step: TwinStep) -> None:
        self.register(row, row.computed)
        self.remove(row)
        row.computed = 0
        self.waiting.insert(0, row)
        step.preempted.append(row.request_id)

    def fill(self, row: TwinRow) -> None:
        while len(row.blocks) < self.blocks_for(row):
            block = self.free.pop(0)
            block.history = None
            row.blocks.append(block)

    def compute_some(self, row: TwinRow, step: TwinStep) -> None:
        count = min(self.budget - step.num_tokens, len(row.tokens) - row.computed)
        if count:
            step.chosen.append((row.request_id, row.computed, count))
            self.register(row, row.computed + count)

    def room_for(self, row: TwinRow, step: TwinStep) -> bool:
        if len(self.running) == self.max_num_seqs or step.num_tokens == self.budget:
            return False
        spare = len(self.pool) // 100 if self.running else 0
        shared = [block for block in self.prefix(row) if block not in self.free]
        return self.blocks_for(row) - len(shared) + spare <= len(self.free)

    def admit(self, row: TwinRow, step: TwinStep) -> None:
        row.blocks = self.prefix(row)
        self.free = [block for block in self.free if block not in row.blocks]
        row.computed = len(row.blocks) * self.block_size
        step.prefix_hit_tokens += len(range(row.ever_computed, min(row.computed, row.num_prompt)))
        self.waiting.remove(row)
        self.running.append(row)
        self.fill(row)
        self.compute_some(row, step)

    def prefix(self, row: TwinRow) -> list[TwinBlock]:
        blocks: list[TwinBlock] = []
        most = min(len(row.tokens) - 1, row.ever_computed) if row.wants_prompt_logprobs else len(row.tokens) - 1
        while self.prefix_caching and (len(blocks) + 1) * self.block_size <= most:
            history = tuple(row.tokens[: (len(blocks) + 1) * self.block_size])
            found = [block for block in self.pool if block.history == history]
            if not found:
                break
            blocks += found
        return blocks

    def register(self, row: TwinRow, num_tokens: int) -> None:
        for i in range(num_tokens // self.block_size):
            history = tuple(row.tokens[: (i + 1) * self.block_size])
            if not self.prefix_caching or any(b.history == history and b is not row.blocks[i] for b in self.pool):
                break
            row.blocks[i].history = history

    def remove(self, row: TwinRow) -> None:
        """Take a row out, wherever it stands."""
        self.give_back(row)
        (self.waiting if row in self.waiting else self.running).remove(row)

    def give_back(self, row: TwinRow) -> None:
        """The last block becomes free first; what can be found is kept longest."""
        for block in reversed(row.blocks):
            if not any(block in other.blocks for other in self.running if other is not row):
                self.free.insert(len(self.free) if block.history else 0, block)
        row.blocks = []
