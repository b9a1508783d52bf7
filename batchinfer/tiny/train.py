"""The script that made the shipped model: a small Llama, trained in minutes on Python's own standard library.

    python batchinfer/tiny/train.py --out DIR --seconds 240      # a GPU: a few minutes; a CPU: the same, but far less learnt

It writes DIR in Hugging Face form: config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json,
tokenizer_config.json; together below 8 MB. No network is used. It needs the `dev` extra (transformers is the model code, so
that what is shipped is a Llama by construction and not by our own reading of it).

Licence facts: the text learnt (see corpus.py) is the standard library of the interpreter that ran this script, copyright
Python Software Foundation and contributors, PSF License Version 2, with a few files under compatible notices of their own.
Nothing else was learnt from. The weights are published with this project under its own licence, and `model/LICENSE-DATA.txt`
repeats this statement beside them.

With `--steps` the schedule counts steps and the result depends only on the seed, the machine and the installed versions.
With `--seconds` it follows the clock, which fits any machine but ends at another step each time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from batchinfer.tiny.corpus import Document, documents, split

BOS, EOS = "<s>", "</s>"
PROSE_REPEATS = 3  # prose is a third of the corpus, and it is what the sample prompts ask for
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = (
    "Return a list of",
    'def read_lines(path):\n    """',
    "The following example shows how to",
    'class ThreadPool:\n    """',
    "user: What is json.loads(s)?\n\nassistant:",
)
DATA_LICENCE = """\
The weights in this folder were trained by batchinfer/tiny/train.py on the Python standard library's own sources and on
nothing else. Those are Copyright (c) 2001 and later Python Software Foundation; All Rights Reserved, and are used under
the PSF License Version 2 (https://docs.python.org/3/license.html).
"""


@dataclass(frozen=True)
class Options:
    out: Path
    seconds: float
    steps: int | None
    epochs: float
    seed: int
    device: str
    batch: int
    sequence: int
    hidden: int
    layers: int
    intermediate: int
    lr: float
    dropout: float
    evaluations: int


def options(arguments: Sequence[str] | None = None) -> Options:
    """The command line. Batch and sequence default to what suits the device."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made when it is missing")
    parser.add_argument("--seconds", type=float, default=240, help="time to train for")
    parser.add_argument("--steps", type=int, help="steps to train for, instead of --seconds and --epochs")
    parser.add_argument("--epochs", type=float, default=40, help="end sooner, after so many passes over the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int, default=32 if cuda else 8, help="sequences of a step")
    parser.add_argument("--sequence", type=int, default=1024 if cuda else 256, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--intermediate", type=int, default=448)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--evaluations", type=int, default=40, help="how often the held-out loss is taken")
    return Options(**vars(parser.parse_args(arguments)))


# Tokenizer ------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of 4,096 tokens without a normalizer; `<s>` goes in front, as Llama has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[BOS, EOS], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, config: LlamaConfig, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All documents behind one another, each as `<s> text </s>`: int64 [tokens]."""
    eos = [tokenizer.token_to_id(EOS)]
    return torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids + eos])


# Model ----------------------------------------------------------------------------------------------------------------


def model_config(opt: Options, tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=opt.hidden,
        intermediate_size=opt.intermediate,
        num_hidden_layers=opt.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=None,
    )


def add_dropout(model: nn.Module, share: float) -> None:
    """Dropout where Llama has none: on the embedding and on what each block adds to the residual stream."""
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, output: F.dropout(output, share, m.training))


def save_model(state: dict[str, Tensor], config: LlamaConfig, folder: Path) -> None:
    """bfloat16 weights, and the config in the plain form that every reader of Llama checkpoints knows."""
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in state.items() if name != "lm_head.weight"}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            **ids,
        },
    )
    _write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    (folder / "LICENSE-DATA.txt").write_text(DATA_LICENCE)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# Training -------------------------------------------------------------------------------------------------------------


def batches(stream: Tensor, opt: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), int64 [batch, sequence], for ever: each pass cuts the stream at another offset, in another order.

    Every window begins with `<s>`, because that is what stands at position 0 whenever the model is used.
    """
    generator = torch.Generator().manual_seed(opt.seed)
    count = (len(stream) - 1) // opt.sequence - 1
    while True:
        offset = int(torch.randint(opt.sequence, (), generator=generator))
        for chosen in torch.randperm(count, generator=generator).split(opt.batch):
            if len(chosen) == opt.batch:
                yield _windows(stream, chosen.to(stream.device) * opt.sequence + offset, opt.sequence)


def _windows(stream: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    tokens = stream[starts[:, None] + torch.arange(length + 1, device=stream.device)]
    inputs = tokens[:, :-1].clone()
    inputs[:, 0] = stream[0]
    return inputs, tokens[:, 1:]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, bfloat16 inside on a GPU."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: Tensor, opt: Options) -> float:
    model.eval()
    count = min((len(stream) - 1) // opt.sequence, 256 if stream.is_cuda else 32)
    starts = torch.arange(count, device=stream.device) * opt.sequence
    losses = [loss_of(model, *_windows(stream, s, opt.sequence)).item() * len(s) for s in starts.split(opt.batch)]
    model.train()
    return sum(losses) / count


def learning_rate(opt: Options, progress: float) -> float:
    """Up over the first 2 %, then down a cosine to a fiftieth."""
    return opt.lr * min(1.0, progress / 0.02 + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: nn.Module, opt: Options) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=opt.lr, betas=(0.9, 0.95), fused=opt.device.startswith("cuda"))


def train(model: nn.Module, learnt: Tensor, held: Tensor, opt: Options) -> dict[str, Tensor]:
    """The weights with the lowest held-out loss, on the CPU in float32."""
    optimizer = make_optimizer(model, opt)
    per_epoch = len(learnt) / (opt.batch * opt.sequence)
    best: dict[str, Tensor] = {}
    best_loss, evaluated, started, loss = math.inf, 0, time.monotonic(), torch.tensor(math.nan)
    for step, (inputs, targets) in enumerate(batches(learnt, opt)):
        elapsed = time.monotonic() - started
        progress = step / opt.steps if opt.steps else max(elapsed / opt.seconds, step / per_epoch / opt.epochs)
        if progress * opt.evaluations >= evaluated + 1 or progress >= 1:
            evaluated += 1
            held_loss = held_out_loss(model, held, opt)
            print(
                f"step {step:,}  epoch {step / per_epoch:.2f}  {elapsed:.0f} s  loss {loss.item():.3f}  held-out {held_loss:.3f}",
                flush=True,
            )
            if held_loss < best_loss:
                best_loss = held_loss
                best = {name: t.detach().float().cpu().clone() for name, t in model.state_dict().items()}
        if progress >= 1:
            return best
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(opt, progress)
        loss = loss_of(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("batches never end")


# The whole ------------------------------------------------------------------------------------------------------------


def texts_of(learnt: list[Document], seed: int) -> list[str]:
    """Prose repeated, all shuffled."""
    texts = [d.text for d in learnt for _ in range(1 if d.kind == "source" else PROSE_REPEATS)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order.tolist()]


@torch.no_grad()
def show_completions(folder: Path, tokenizer: Tokenizer) -> None:
    """Greedy completions of what was written, read back: for human eyes."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0)
        print(f"--- {prompt!r}\n{tokenizer.decode(out[0, ids.shape[1] :].tolist())}")


def main() -> None:
    opt = options()
    torch.manual_seed(opt.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    opt.out.mkdir(parents=True, exist_ok=True)
    learnt, held = split(documents())
    tokenizer = train_tokenizer([d.text for d in learnt])
    learnt_tokens = token_stream(tokenizer, texts_of(learnt, opt.seed)).to(opt.device)
    held_tokens = token_stream(tokenizer, [d.text for d in held]).to(opt.device)
    config = model_config(opt, tokenizer)
    model: nn.Module = LlamaForCausalLM(config)
    model.to(opt.device)
    add_dropout(model, opt.dropout)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(learnt_tokens):,} tokens to learn from "
        f"(prose {PROSE_REPEATS} times), {len(held_tokens):,} held out, on {opt.device}",
        flush=True,
    )
    best = train(model, learnt_tokens, held_tokens, opt)
    save_tokenizer(tokenizer, config, opt.out)
    save_model(best, config, opt.out)
    print(f"{sum(f.stat().st_size for f in opt.out.iterdir()):,} bytes in {opt.out}")
    show_completions(opt.out, tokenizer)


if __name__ == "__main__":
    main()
