"""What a checkpoint may look like, and the sentence for what it may not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchinfer.config import ConfigError, ModelConfig
from batchinfer.hardware import usable_cores
from batchinfer.model import loader
from batchinfer.model.config import load_shape
from batchinfer.model.decoder import Decoder
from batchinfer.model.parallel import TensorParallel
from batchinfer.model.safetensors_file import ITEM_BYTES, SafetensorsFile
from tests.checkpoints import save_checkpoint
from tests.model.oracle import load


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path)
    return tmp_path


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _logits(folder):
    return load(folder).step({0: [1, 2, 3]})[0]


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(NORM), rf"it lacks 1 tensor \({NORM}\)$"),
        (lambda t: t.update(renamed=t.pop(NORM)), rf"lacks 1 tensor \({NORM}\) and holds 1 tensor \(renamed\)"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            r"holds 1 tensor \(.*q_proj\.bias\) without a place",
        ),
        (lambda t: t.update({NORM: torch.ones(31)}), rf"{NORM} has shape \[31\], but config.json calls for \[32\]"),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), "has type I8: it must be one of BF16"),
    ],
)
def test_wrong_tensors_are_named(folder, change, sentence):
    _edit(folder, change)
    with pytest.raises(ConfigError, match=sentence):
        load(folder)


def test_rotary_buffers_and_a_tied_head_are_tolerated(tmp_path):
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = _logits(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(97, 32)}
    _edit(tmp_path, lambda tensors: tensors.update(extra))
    assert torch.equal(_logits(tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_checkpoints_are_cast_to_the_models_type(folder, dtype):
    _edit(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    narrow = _logits(folder)
    _edit(folder, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))
    assert torch.equal(_logits(folder), narrow)


BIASES = {"family": "Qwen3", "head_dim": 12, "attention_bias": True, "vocab_size": 97}


def _whole(model, theirs):
    """Every slice that a rank holds equals that part of the checkpoint, and no tensor is left out."""
    names = set()
    for wish in model.slices():
        names.add(wish.name)
        part = theirs[wish.name].detach().narrow(wish.dim, wish.start, wish.stop - wish.start)
        assert torch.equal(wish.destination, part.to(wish.destination.dtype)), wish.name
    assert names == set(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (0, 4), (3, 4)])
def test_pieces_of_slices_are_the_slices_of_the_checkpoint(tmp_path, monkeypatch, dtype, rank, size):
    """Column-parallel layers hold rows of every part, row-parallel ones columns, and the vocabulary has an odd number of rows."""
    theirs = dict(save_checkpoint(tmp_path, max_shard_size="20KB", dtype=dtype, **BIASES).named_parameters())
    config = ModelConfig(path=str(tmp_path))
    shape = load_shape(config)
    model = Decoder(shape, TensorParallel(rank, size), torch.bfloat16, torch.device("cpu"), 16)
    monkeypatch.setattr(loader, "PIECE_BYTES", 200)  # less than a row of some
    report = loader.load_weights(model, shape, config, 0, torch.device("cpu"))
    _whole(model, theirs)
    found = {wish.name: wish.destination for wish in model.slices()}
    assert report.bytes == sum(tensor.nbytes for tensor in found.values())
    q, kv = 48 // size, max(12, 24 // size)
    sizes = {"q_proj.bias": (q,), "k_proj.bias": (kv,), "o_proj.bias": (32,), "q_norm.weight": (12,), "o_proj.weight": (32, q)}
    assert {name: tuple(found[f"model.layers.1.self_attn.{name}"].shape) for name in sizes} == sizes


def test_a_rank_beyond_the_end_of_a_short_vocabulary_loads_no_rows_of_it(tmp_path):
    theirs = dict(save_checkpoint(tmp_path, vocab_size=5, bos_token_id=1, eos_token_id=2).named_parameters())
    config = ModelConfig(path=str(tmp_path))
    shape = load_shape(config)
    model = Decoder(shape, TensorParallel(3, 4), torch.float64, torch.device("cpu"), 16)
    loader.load_weights(model, shape, config, 0, torch.device("cpu"))
    assert next(model.slices()).destination.shape == (0, 32)
    _whole(model, theirs)


def test_a_rank_asks_for_its_slices_and_no_more(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, **BIASES)
    config, read = ModelConfig(path=str(tmp_path)), []
    shape, really_read = load_shape(config), SafetensorsFile.read

    def watched(file, tensor, rows, columns, into):
        read.append(into.size // ITEM_BYTES[tensor.dtype])
        really_read(file, tensor, rows, columns, into)

    monkeypatch.setattr(SafetensorsFile, "read", watched)
    for rank in (0, 1):
        read.clear()
        model = Decoder(shape, TensorParallel(rank, 2), torch.float64, torch.device("cpu"), 16)
        loader.load_weights(model, shape, config, 0, torch.device("cpu"))
        padding = rank * 2 * shape.hidden_size  # one row of 98 for 97 tokens, of the embedding and of the head
        assert sum(read) == shape.num_parameters(2) - padding


def test_the_report_says_how_fast():
    assert loader.LoadReport(3 << 30, 2.0).explain() == "3.0 GiB of weights in 2.0 s, 1.6 GB/s"


LOAD = """
import sys, torch
from batchinfer.config import ModelConfig
from batchinfer.model.config import load_shape
from batchinfer.model.decoder import Decoder
from batchinfer.model.loader import load_weights
from batchinfer.model.parallel import TensorParallel
from batchinfer.model.safetensors_file import ITEM_BYTES, SafetensorsFile

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

config, cpu = ModelConfig(path=sys.argv[1]), torch.device("cpu")
shape = load_shape(config)
model = Decoder(shape, TensorParallel(0, int(sys.argv[2])), torch.bfloat16, cpu, 16)
for parameter in model.parameters():
    parameter.fill_(1)  # resident from now on
before = kib("VmRSS")
report = load_weights(model, shape, config, 0, cpu)
print((kib("VmHWM") - before) >> 10, report.bytes >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", [1, 2])
def test_host_memory_beside_the_weights_is_a_few_pieces_whatever_a_tensors_size(tmp_path, size):
    """A file of 376 MiB in float32 with a tensor of 256 MiB: the peak stays within the pieces that are under way.

    One that is cut by columns is copied out of a mapping of whole rows, whose pages count too.
    """
    sizes = {"vocab_size": 65_536, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2}
    save_checkpoint(tmp_path, dtype=torch.float32, tie_word_embeddings=True, **sizes)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), str(size)], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights == 188 // size
    readers = min(loader.MAX_READERS, usable_cores())
    pieces = readers * (loader.NUM_BUFFERS + (size if size > 1 else 0)) * loader.PIECE_BYTES >> 20
    assert grown < pieces + 16 and (readers > 2 or pieces + 16 < weights)


def test_a_file_that_is_cut_while_it_is_read_is_named(folder, monkeypatch):
    really_read = SafetensorsFile.read

    def cut(file, *rest):
        file.path.write_bytes(file.path.read_bytes()[:2000])
        really_read(file, *rest)

    monkeypatch.setattr(SafetensorsFile, "read", cut)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a safetensors file, or it is cut short: it ends"):
        load(folder)


def test_files_that_are_not_a_checkpoint(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is not a safetensors file, or it is cut short"):
        load(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    for text in ("{}", "{", "[]", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 1}}'):
        index.write_text(text)
        with pytest.raises(ConfigError, match="is not an index of safetensors"):
            load(folder)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    save_checkpoint(tmp_path, max_shard_size="10KB")
    files = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(files) > 2
    (tmp_path / min(files)).unlink()
    with pytest.raises(ConfigError, match=r"\.safetensors is missing"):
        load(tmp_path)
