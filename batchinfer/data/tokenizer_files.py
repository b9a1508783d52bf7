"""The files of a checkpoint that say how text becomes tokens, read as transformers 5 reads them.

`tokenizer.json` is the tokenizer. Transformers' `AutoTokenizer` changes three things in it, and so do we, since each changes ids:

- A token that only `tokenizer_config.json` knows (`added_tokens_decoder`, the named `*_token`s, `extra_special_tokens`) is added
  behind the vocabulary. Without an `added_tokens_decoder`, `special_tokens_map.json` and `added_tokens.json` count too.
- `tokenizer_class: LlamaTokenizer` on a SentencePiece vocabulary keeps vocabulary, merges and post-processor, and builds the rest
  anew: a text gets its leading space according to `legacy` and `add_prefix_space`, not according to `tokenizer.json`.
- `split_special_tokens` makes the special tokens of a prompt plain text.

Not changed, as there: `add_bos_token` and `add_eos_token` are ignored where there is a `tokenizer.json`; its post-processor alone
says which special tokens are added. The other class that our models name, `Qwen2Tokenizer`, rebuilds what Qwen's tokenizer.json
says already, so the file is used as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import tokenizers

from batchinfer.config import ConfigError

_LLAMA_SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_KEEPS_TOKENIZER_JSON = ("mistral", "qwen2")  # model types for which transformers does not believe in LlamaTokenizer
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint folder. Raises ConfigError when tokenizer.json is none that `tokenizers` reads."""
    path = folder / "tokenizer.json"
    config = _tokenizer_config(folder)
    try:
        is_llama = _is_llama(folder)
        backend = (
            tokenizers.Tokenizer.from_str(_as_llama(path, config)) if is_llama else tokenizers.Tokenizer.from_file(str(path))
        )
        _add_tokens(backend, folder, config)
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"model.path: {str(path)!r} is not a tokenizer that `tokenizers` reads: {error}") from error
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    return backend


def load_special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like by name, as templates know them."""
    named = (_LLAMA_SPECIAL_TOKENS if _is_llama(folder) else {}) | _tokenizer_config(folder)
    tokens = {name: _content(value) for name, value in named.items() if name.endswith("_token")}
    return {name: token for name, token in tokens.items() if token is not None}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint; empty when there is no such file. Raises ConfigError when it is no object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {str(path)!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"model.path: {str(path)!r} must hold a JSON object")
    return value


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; the older special_tokens_map.json wins over it, unless the config is of the newer kind."""
    config = read_json(folder / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | read_json(folder / "special_tokens_map.json")


def _is_llama(folder: Path) -> bool:
    """Would transformers make a LlamaTokenizer of this folder's tokenizer.json?"""
    model = read_json(folder / "config.json")
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class") or model.get("tokenizer_class")
    if str(name).removesuffix("Fast") != "LlamaTokenizer" or model.get("model_type") in _KEEPS_TOKENIZER_JSON:
        return False
    path = folder / "tokenizer.json"
    return path.is_file() and '"ByteLevel"' not in path.read_text("utf-8")


def _as_llama(path: Path, config: Mapping[str, Any]) -> str:
    """tokenizer.json with everything but vocabulary, merges and post-processor as transformers' LlamaTokenizer has it."""
    raw = json.loads(path.read_text("utf-8"))
    prefix_space = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix_space else "always" if config.get("legacy") else "first"
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix_space else []
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    raw["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    bpe = {"type": "BPE", "fuse_unk": True, "byte_fallback": True}
    raw["model"] = bpe | {name: raw["model"][name] for name in ("vocab", "merges")}
    if "added_tokens_decoder" in config:
        raw["added_tokens"] = []
    return json.dumps(raw)


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds what tokenizer.json does not have: listed tokens in the order of their ids, then special tokens known by name."""
    known = backend.get_added_tokens_decoder()
    special = list(_special_tokens(config, load_special_tokens(folder)))
    if "added_tokens_decoder" in config:
        listed = {int(i): _added_token(fields) for i, fields in config["added_tokens_decoder"].items()}
    else:
        older = read_json(folder / "added_tokens.json")
        listed = _older_tokens(older, {token.content for token in special}) | known
    same = {repr(token) for token in known.values()}
    new = [listed[i] for i in sorted(listed) if repr(listed[i]) not in same]
    contents = {token.content for token in [*known.values(), *new]}
    for token in special:
        if token.content not in contents:
            contents.add(token.content)
            new.append(token)
    backend.add_tokens(new)


def _older_tokens(ids: Mapping[str, int], special: Set[str]) -> dict[int, tokenizers.AddedToken]:
    return {
        token_id: tokenizers.AddedToken(content, special=content in special, normalized=content not in special)
        for content, token_id in ids.items()
    }


def _special_tokens(config: Mapping[str, Any], named: Mapping[str, str]) -> Iterator[tokenizers.AddedToken]:
    for name, content in named.items():
        value = config.get(name)
        yield _added_token((value if isinstance(value, dict) else {}) | {"content": content, "special": True})
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for value in extra.values() if isinstance(extra, dict) else extra:
        yield _added_token({**(value if isinstance(value, dict) else {"content": value}), "special": True})


def _added_token(fields: Mapping[str, Any]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(fields["content"], **{name: fields[name] for name in _TOKEN_FLAGS if name in fields})


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
