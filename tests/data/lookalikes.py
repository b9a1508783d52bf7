"""Small tokenizers with the files of real checkpoints: the same parts, flags and classes, trained on a few lines of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "Hello world, how are you? Fine. 12345",
    "naïve café déjà vu",
    "stop here\n\nUser: again",
    "[INST] what is it [/INST] it is",
]
TEMPLATES = Path(__file__).parent / "chat_templates"


def save(folder: Path, backend: tokenizers.Tokenizer, model: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"transformers_version": "4.40.0", **model}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def listed(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """The added tokens as tokenizer_config.json lists them."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {str(i): {flag: getattr(t, flag) for flag in flags} for i, t in backend.get_added_tokens_decoder().items()}


def llama_2(folder: Path, model: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """SentencePiece BPE with byte fallback; the leading space comes from the normaliser."""
    backend = _sentencepiece([])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return save(folder, backend, model or {"model_type": "llama"}, _llama_config(backend) | config)


def mistral_v3(folder: Path, model: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """As Llama 2, with control tokens, and the leading space from the pre-tokenizer."""
    backend = _sentencepiece(["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return save(folder, backend, model or {"model_type": "mistral"}, _llama_config(backend) | config)


def llama_3(folder: Path, model: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """Byte-level BPE; a template in a sequence of post-processors puts the bos in front."""
    pattern = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    backend = _byte_level(pattern)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    bos = "<|begin_of_text|>"
    front = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), front])
    return save(
        folder,
        backend,
        model or {"model_type": "llama"},
        {
            "added_tokens_decoder": listed(backend),
            "bos_token": bos,
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": True,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            **config,
        },
    )


def qwen(folder: Path, model: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """Byte-level BPE without a bos; some of the added tokens are ordinary text when decoded."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = _byte_level(PRETOKENIZE_REGEX)
    backend.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return save(
        folder,
        backend,
        model or {"model_type": "qwen3"},
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": listed(backend),
            "additional_special_tokens": special[1:],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            **config,
        },
    )


def _older(folder: Path, **config: Any) -> Path:
    """As files were before tokenizer_config.json listed the added tokens."""
    llama_2(folder, **config)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "<unk>"}))
    eos = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>"}))
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1, "<pad>": size}))
    return folder


def _with_extra_tokens(folder: Path, builder: Callable[..., Path] = llama_2) -> Path:
    mask = {
        "__type": "AddedToken",
        "content": "<mask>",
        "lstrip": True,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
    return builder(folder, pad_token="<pad>", mask_token=mask, additional_special_tokens=["<tool>", "<pad>"])


KINDS: dict[str, Callable[[Path], Path]] = {
    "llama 2": lambda folder: llama_2(folder, legacy=False),
    "llama 2, legacy": lambda folder: llama_2(folder, legacy=True),
    "llama 2, fast class": lambda folder: llama_2(folder, tokenizer_class="LlamaTokenizerFast"),
    "llama 2, no prefix space": lambda folder: llama_2(folder, add_prefix_space=False),
    "llama 2, bos and eos flags": lambda folder: llama_2(folder, add_bos_token=False, add_eos_token=True),
    "llama 2, class in config.json": lambda folder: llama_2(
        folder, {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}, tokenizer_class=None
    ),
    "llama 2, general class": lambda folder: llama_2(folder, tokenizer_class="PreTrainedTokenizerFast"),
    "llama 2, no config": lambda folder: llama_2(folder, {}),
    "llama 2, older files": lambda folder: _older(folder, legacy=False),
    "llama 2, older files, general class": lambda folder: _older(folder, tokenizer_class="PreTrainedTokenizerFast"),
    "llama 2, extra tokens": _with_extra_tokens,
    "mistral v1": lambda folder: llama_2(folder, {"model_type": "mistral"}, legacy=True),
    "mistral v3": lambda folder: mistral_v3(folder, legacy=False, add_prefix_space=None),
    "llama 3": llama_3,
    "llama 3, wrong class": lambda folder: llama_3(folder, tokenizer_class="LlamaTokenizer"),
    "llama 3, extra tokens": lambda folder: _with_extra_tokens(folder, llama_3),
    "llama 3, special tokens as text": lambda folder: llama_3(folder, split_special_tokens=True),
    "qwen 2.5": lambda folder: qwen(folder, {"model_type": "qwen2"}),
    "qwen 2.5, wrong class": lambda folder: qwen(
        folder, {"model_type": "qwen2"}, tokenizer_class="LlamaTokenizerFast", bos_token="<|im_start|>"
    ),
    "qwen 3": qwen,
    "qwen 3, extra tokens": lambda folder: qwen(folder, pad_token="<pad>", additional_special_tokens=["<tool>"]),
    "sentencepiece under qwen 3": lambda folder: llama_2(folder, {"model_type": "qwen3"}),
}


def _sentencepiece(control: Sequence[str]) -> tokenizers.Tokenizer:
    base = ["<unk>", "<s>", "</s>"]
    pieces = [*base, *control, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=430, special_tokens=pieces, show_progress=False))
    raw = json.loads(backend.to_str())  # the trainer marks every given piece as an added token, the bytes too
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in (*base, *control)]
    raw["pre_tokenizer"] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps(raw))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def _llama_config(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": listed(backend),
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }


def _byte_level(pattern: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    )
    backend.decoder = decoders.ByteLevel()
    return backend
