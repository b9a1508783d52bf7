"""A row's json_schema, regex or choice becomes a compiled grammar, in the thread that prepares rows.

llguidance (Rust) does the work: an Earley parser over a lexer of regular-expression derivatives, which tells at every point
of a completion which tokens may come next. It is imported with the first grammar. The engine follows it (`engine.grammar`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from batchinfer.config import GRAMMARS, SamplingConfig
from batchinfer.data.tokenizer import Tokenizer
from batchinfer.engine.sequence import Grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

CACHED_GRAMMARS = 256
# Between the parts of a JSON text: one space, or one newline and an indentation. Without a bound, a model that has lost its way
# can write white space until max_tokens; without any, one that likes to write it is pushed off its way.
WHITE_SPACE = r" |\n[ \t]{0,32}"
# llguidance can force the tokenizer's own tokens where the text is fixed, but then follows the tokenizer into special tokens
# and normalised text, which the grammar refuses afterwards. So every tokenization of an allowed text is allowed.
HEADER = '%llguidance {"no_forcing": true}\n'
_REASON_LENGTH, _VALUE_LENGTH = 300, 100  # characters of an error's parts


class BadGrammar(ValueError):
    """A grammar is not valid, or nothing can satisfy it: one sentence."""


def grammar_of(sampling: SamplingConfig) -> tuple[str, str | tuple[str, ...]] | None:
    """Which of GRAMMARS is set, and its value in a form that can be hashed."""
    for kind in GRAMMARS:
        value = getattr(sampling, kind)
        if value is not None:
            return kind, tuple(value) if kind == "choice" else value
    return None


class GrammarCompiler:
    """Compiles grammars for one tokenizer and model, each text once as long as it is among the last CACHED_GRAMMARS.

    Costs nothing until the first grammar; then the tokenizer's vocabulary becomes a trie (a second and 90 MiB for 128,000
    tokens). A common grammar compiles in a millisecond or two, without the GIL. Any thread may call `compile`.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._vocabulary: Vocabulary | str | None = None
        self._cached = lru_cache(CACHED_GRAMMARS)(self._compile)

    def compile(self, sampling: SamplingConfig) -> Grammar | None:
        """The grammar that is asked for, if one is. Raises BadGrammar."""
        grammar = grammar_of(sampling)
        if grammar is None:
            return None
        compiled = self._cached(*grammar)
        if isinstance(compiled, str):
            raise BadGrammar(compiled)
        return compiled

    def _compile(self, kind: str, value: str | tuple[str, ...]) -> Grammar | str:
        """What is wrong is returned, so that it is remembered too: a million rows may share one mistake."""
        try:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary if isinstance(self._vocabulary, str) else self._vocabulary.compile(kind, value)
        except BadGrammar as error:
            return str(error)

    def _load(self) -> Vocabulary | str:
        try:
            return Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
        except BadGrammar as error:
            return str(error)


class Vocabulary:
    """The tokens of a model as llguidance sees them."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """Raises BadGrammar for a checkpoint with which no grammar can be followed."""
        if tokenizer is None:
            raise BadGrammar("json_schema, regex and choice need a tokenizer, and the checkpoint has no tokenizer.json")
        known = [token for token in sorted(eos_token_ids) if token < vocab_size and token <= tokenizer.largest_id]
        if not known:
            raise BadGrammar("json_schema, regex and choice need a model with an end-of-sequence token, and this one has none")
        self._vocab_size = vocab_size
        self._tokenizer = load_ll_tokenizer(tokenizer, vocab_size, known)
        self._strips_space = _strips_leading_space(tokenizer, self._tokenizer)

    def compile(self, kind: str, value: str | tuple[str, ...]) -> Grammar:
        """Raises BadGrammar, also for a grammar that is valid and that no text satisfies."""
        from llguidance import LLMatcher, LLParserLimits

        try:
            lark = HEADER + LARK[kind](value, self._strips_space)
        except ValueError as error:
            raise _refusal(kind, value, str(error)) from error
        matcher = LLMatcher(self._tokenizer, lark, limits=LLParserLimits(verbose_errors=False), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out whether there is a first token at all; copies inherit the work
        if matcher.is_error():
            raise _refusal(kind, value, reason(matcher.get_error()))
        return Grammar(matcher, self._vocab_size)


def _refusal(kind: str, value: str | tuple[str, ...], why: str) -> BadGrammar:
    text = " ".join((value if isinstance(value, str) else str(list(value))).split())
    return BadGrammar(f"sampling.{kind}={_short(text, _VALUE_LENGTH)}: {why}")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."


def reason(error: str) -> str:
    """What llguidance says went wrong, in one line: without positions in our wrapping, excerpts and its own state."""
    if error.startswith("NoExtension"):
        return "no text can satisfy it"
    text = re.split(r"\n<|\n +\d+ \| ", error)[0].split("\nerror: ")[-1]
    return _short(" ".join(re.sub(r"^(at )?\d+\(\d+\): ", "", text).split()), _REASON_LENGTH)


def load_ll_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """llguidance's view of a tokenizer. Ids of the model without a token are never allowed; nor are special tokens.

    A tokenizer may have more tokens than the model: those are left out. Raises BadGrammar for a kind it does not read.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    try:
        whole = LLTokenizer(tokenizer.to_json(), n_vocab=max(vocab_size, tokenizer.largest_id + 1), eos_token=eos_token_ids)
    except ValueError as error:
        raise BadGrammar(f"json_schema, regex and choice do not work with the checkpoint's tokenizer.json: {error}") from error
    if tokenizer.largest_id < vocab_size:
        return whole
    return LLTokenizer(TokenizerWrapper(_FirstTokens(whole, vocab_size)), eos_token=eos_token_ids)


class _FirstTokens:
    """The first ids of a tokenizer, in the form that llguidance takes."""

    def __init__(self, whole: LLTokenizer, vocab_size: int) -> None:
        self.eos_token_id, self.bos_token_id = whole.eos_token, None
        self.tokens = [whole.decode_bytes([token_id]) for token_id in range(vocab_size)]
        self.special_token_ids = [token_id for token_id in range(vocab_size) if whole.is_special_token(token_id)]
        self._whole = whole

    def __call__(self, text: bytes) -> list[int]:
        return [token_id for token_id in self._whole.tokenize_bytes(text) if token_id < len(self.tokens)]


def _strips_leading_space(tokenizer: Tokenizer, ll_tokenizer: LLTokenizer) -> bool:
    """Whether decoding drops one space at the beginning of a text, as SentencePiece's does. Raises BadGrammar for other loss."""
    ids = ll_tokenizer.greedy_tokenize(" a a")
    text = tokenizer.decode(ids)
    if text not in (" a a", "a a"):
        raise BadGrammar(
            f"json_schema, regex and choice do not work with the checkpoint's tokenizer: ' a a' comes back as {text!r}"
        )
    return text == "a a"


def _json_schema(text: str, strips_space: bool) -> str:
    schema = _parsed(text)
    schema.setdefault("x-guidance", {"whitespace_pattern": WHITE_SPACE})
    space = '" "? ' if strips_space else ""
    return f"start: {space}%json {json.dumps(schema)}\n"


def _parsed(text: str) -> dict[str, Any]:
    """The mapping in JSON text. Raises ValueError."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        schema = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"must be a JSON object, not {json.dumps(schema)}")
    return schema


def _regex(pattern: str, strips_space: bool) -> str:
    from llguidance import regex_to_lark

    if "\n" in pattern and re.search(r"\(\?[a-z]*x", pattern):
        raise ValueError("a pattern in verbose mode, (?x), must be a single line")  # its ends of lines are lost on the way
    _require_unicode(pattern)
    return _whole(f"/{regex_to_lark(pattern, use_ascii='d')}/", strips_space)  # \d is 0 to 9, as in JSON schemas


def _choice(strings: tuple[str, ...], strips_space: bool) -> str:
    for string in strings:
        _require_unicode(string)
    return _whole(" | ".join(map(json.dumps, strings)), strips_space)


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is not valid Unicode text") from error


def _whole(terminal: str, strips_space: bool) -> str:
    """One terminal as the whole text. Where decoding drops a leading space: an extra one, or a text that begins with none."""
    text = r"/ / R | (R & /([^ ](?s:.*))?/)" if strips_space else "R"
    return f"start: TEXT\nTEXT: {text}\nR: {terminal}\n"


LARK: dict[str, Callable[[Any, bool], str]] = {"json_schema": _json_schema, "regex": _regex, "choice": _choice}
