"""Text to token ids and back, over the `tokenizers` library alone, and stop strings found while tokens arrive.

A `Tokenizer` is immutable and shared; an `IncrementalDecoder` and a `StopChecker` belong to one sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from batchinfer.config import ConfigError
from batchinfer.data.tokenizer_files import load_backend, load_special_tokens

_REPLACEMENT = "\ufffd"  # what a decoder says for bytes that are no character, or not yet one
_SETTLE_AFTER = 8  # tokens decoded again and again before the decoder tries to move on
_CONTEXT = 4  # settled tokens kept in front, so that the next ones are decoded as in the middle of a text


class Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json`, and the special tokens that `tokenizer_config.json` names."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        backend.no_truncation()  # a tokenizer.json may carry both; length is the business of input.too_long
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.bos_token_id: int | None = self._special_id("bos_token")
        self.eos_token_id: int | None = self._special_id("eos_token")
        fallbacks = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(token for token in fallbacks if token is not None)
        self._special_ids = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}

    @classmethod
    def load(cls, model_path: str | Path) -> Tokenizer:
        """Raises ConfigError when the folder has no readable tokenizer.json."""
        folder = Path(model_path)
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(_missing(folder))
        return cls(load_backend(folder), load_special_tokens(folder))

    @property
    def vocab_size(self) -> int:
        """Ids that have a token, added ones included. The model's embedding may be larger."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def largest_id(self) -> int:
        """No text has a token id above this; -1 without a vocabulary."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def eos_token_ids(self) -> list[int]:
        return [] if self.eos_token_id is None else [self.eos_token_id]

    def to_json(self) -> str:
        """What a tokenizer.json holds."""
        return str(self._backend.to_str())

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Special tokens: those that the tokenizer's own post-processor adds, and no more."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids: special tokens skipped, spaces left as they are, ids without a token ignored."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=True))

    def decode_batch(self, token_ids: Sequence[list[int]]) -> list[str]:
        """`decode` of many at once: in parallel, and without the GIL, which `decode` holds."""
        texts: list[str] = self._backend.decode_batch(list(token_ids), skip_special_tokens=True)
        return texts

    def gives_text(self, token_id: int) -> bool:
        """False for ids that `decode` leaves out: special tokens, and ids without a token."""
        return token_id not in self._special_ids and self._backend.id_to_token(token_id) is not None

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"model.path={folder}: no such folder; give a checkpoint folder that holds tokenizer.json"
    if (folder / "tokenizer.model").is_file():
        target = str(folder / "tokenizer.json")
        return (
            f"model.path={folder}: has tokenizer.model but no tokenizer.json; convert it once, where transformers, sentencepiece"
            f" and protobuf are installed: AutoTokenizer.from_pretrained({str(folder)!r}).backend_tokenizer.save({target!r})"
        )
    return f"model.path={folder}: has no tokenizer.json; text prompts need one, input.token_ids_column does not"


class IncrementalDecoder:
    """The text of a growing list of token ids, at a cost per token that does not grow with the text.

    Only the ids since the last safe border are decoded again, with a few ids before them as context (so that a leading space
    is dropped at the beginning of the text and nowhere else). A border is safe when no later token can change the text before
    it: it does not end in a broken character, and not in a byte-fallback token, since a run of those is valid or invalid as a
    whole. Text that ends in a broken character is held back until the rest of the character has come.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # context, then what is not settled
        self._settled = ""  # the text before the unsettled ids
        self._context_ids = 0  # how many of _ids are context, and the text they give by themselves
        self._context_text = ""
        self._tail = ""  # the text of the unsettled ids
        self._try_at = _SETTLE_AFTER

    def add(self, token_ids: Sequence[int]) -> str:
        """The text so far, after these ids, without the characters that are not complete yet."""
        self._ids.extend(token_ids)
        whole = self._tokenizer.decode(self._ids)
        self._tail = whole[len(self._context_text) :]
        if len(self._ids) - self._context_ids >= self._try_at:
            self._settle(whole)
        return self._settled + self._tail.rstrip(_REPLACEMENT)

    def finish(self) -> str:
        """The text of all ids, as `Tokenizer.decode` gives it: nothing is held back any more."""
        return self._settled + self._tail

    @property
    def settled_length(self) -> int:
        """Characters at the beginning of the text that no later token will change."""
        return len(self._settled)

    def _settle(self, whole: str) -> None:
        context = self._ids[-_CONTEXT:]
        text = self._tokenizer.decode(context)
        # A run of byte tokens goes on behind tokens without text.
        last = next(filter(self._tokenizer.gives_text, reversed(self._ids)), None)
        safe = last not in self._tokenizer.byte_ids and not whole.endswith(_REPLACEMENT)
        if not (safe and text.strip() and whole.endswith(text)):
            self._try_at *= 2 if safe else 1  # the next token may be a better border; a context without text is not, for long
            return
        self._settled += self._tail
        self._tail = ""
        self._ids, self._context_ids, self._context_text = context, len(context), text
        self._try_at = _SETTLE_AFTER


class StopChecker:
    """Looks for stop strings in one sequence's text while its tokens arrive.

    A match that ends within the text of the first `min_tokens` tokens does not count.
    """

    def __init__(self, stop: tuple[str, ...], decoder: IncrementalDecoder, min_tokens: int) -> None:
        self.decoder = decoder
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._floor = 0  # length of the text in which no match may end

    def push(self, token_ids: Sequence[int]) -> str | None:
        """The final text, cut before the earliest stop string, once there is one. How tokens are grouped makes no difference."""
        for token_id in token_ids:
            searched = max(0, self.decoder.settled_length - self._longest + 1)
            text = self.decoder.add([token_id])
            self._num_tokens += 1
            if self._num_tokens <= self._min_tokens:
                self._floor = max(self._floor, len(text))  # half a character can take back a run of byte tokens for a moment
                continue
            starts = (text.find(stop, max(searched, self._floor - len(stop) + 1)) for stop in self._stop)
            first = min((start for start in starts if start >= 0), default=-1)
            if first >= 0:
                return text[:first]
        return None
