"""How fast a checkpoint in the page cache reaches the GPUs, beside what the host's links and its page cache give.

    torchrun --standalone --nproc-per-node=2 slurm/bench/load.py --folder /tmp/checkpoint model=llama13b
    python slurm/bench/load.py --folder /tmp/checkpoint model=llama7b model.architecture.num_hidden_layers=4 --device cpu

The checkpoint is made of random bits when the folder holds none: the model's shapes in bfloat16, files of `--file-gib`; then it
is read once. Every rank measures at the same time as the others, between barriers, best of `--repeats`:
`host link`: pinned memory to the device; `page cache`: files to pinned memory, every rank all of them, by as many threads as
the loader has; `loaded`: `load_weights`, of which the first, which pins the buffers, is also told apart. Memory: the growth of
this process's resident pages at their peak while it loads, and what is pinned.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from batchinfer.compose import compose
from batchinfer.hardware import usable_cores
from batchinfer.model import checkpoint, loader
from batchinfer.model.config import ModelShape, load_shape
from batchinfer.model.decoder import Decoder
from batchinfer.model.parallel import TensorParallel, init_distributed

LINK_BYTES = 1 << 30
RANDOM_BYTES = 64 << 20


@dataclass(frozen=True)
class Measured:
    """Of one rank: GB/s, seconds, MiB."""

    link: float
    cache: float
    first: float
    loaded: float
    seconds: float
    resident: int
    pinned: int


def make_checkpoint(folder: Path, shape: ModelShape, architecture: dict[str, Any], file_bytes: int) -> None:
    """All tensors of a model of this shape in bfloat16, in files of about so many bytes, with an index and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Decoder(shape, TensorParallel(), torch.bfloat16, torch.device("meta"), 1)
    sizes = {wish.name: wish.shape for wish in model.slices()}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = file_bytes
    for name, size in sizes.items():
        if room <= 0:
            files.append({})
            room = file_bytes
        files[-1][name] = size
        room -= 2 * math.prod(size)
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps({**architecture, "torch_dtype": "bfloat16"}))
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_file(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, size in tensors.items():
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).integers(0, 256, RANDOM_BYTES, dtype=np.uint8).data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, RANDOM_BYTES):
            file.write(noise[: min(RANDOM_BYTES, end - at)])


def best(repeats: int, parallel: TensorParallel, work: Callable[[], int]) -> float:
    """GB/s of `work`, which returns bytes; all ranks begin together."""
    return max(once(parallel, work) for _ in range(repeats))


def once(parallel: TensorParallel, work: Callable[[], int]) -> float:
    together(parallel)
    begin = time.monotonic()
    num_bytes = work()
    return num_bytes / (time.monotonic() - begin) / 1e9


def together(parallel: TensorParallel) -> None:
    if parallel.size > 1:
        dist.barrier(parallel.host_group)


def host_link(device: torch.device) -> Callable[[], int]:
    pinned = device.type == "cuda"
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    here = torch.ones(LINK_BYTES, dtype=torch.uint8, pin_memory=pinned)

    def copy() -> int:
        there.copy_(here, non_blocking=True)
        if pinned:
            torch.cuda.synchronize(device)
        return LINK_BYTES

    return copy


def page_cache(folder: Path, readers: int, pinned: bool) -> Callable[[], int]:
    """Reads every file once, into one buffer for each thread."""
    size = loader.PIECE_BYTES
    files = [os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.safetensors"))]
    buffers = [torch.ones(size, dtype=torch.uint8, pin_memory=pinned).numpy() for _ in range(readers)]
    pieces = [(fd, at) for fd in files for at in range(0, os.fstat(fd).st_size, size)]

    def share(reader: int) -> int:
        return sum(os.preadv(fd, [buffers[reader].data], at) for fd, at in pieces[reader::readers])

    def read() -> int:
        with ThreadPoolExecutor(readers) as pool:
            return sum(pool.map(share, range(readers)))

    return read


def resident_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(args: argparse.Namespace, words: list[str], parallel: TensorParallel, device: torch.device) -> Measured:
    config = replace(compose([*words, "input=sample"], planning=True).model, path=str(args.folder))
    shape, readers = load_shape(config), min(loader.MAX_READERS, usable_cores())
    model = Decoder(shape, parallel, getattr(torch, args.dtype), device, 1)
    if device.type == "cpu":
        for parameter in model.parameters():
            parameter.fill_(1)  # resident from now on
    reports = []

    def load() -> int:
        reports.append(loader.load_weights(model, shape, config, 0, device))
        return reports[-1].bytes

    page_cache(args.folder, readers, False)()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident pages begins anew
    before = resident_kib("VmRSS")
    first = once(parallel, load)
    resident = (resident_kib("VmHWM") - before) >> 10
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"] >> 20 if device.type == "cuda" else 0
    loaded = best(args.repeats, parallel, load)
    seconds = min(report.seconds for report in reports)
    cache = best(args.repeats, parallel, page_cache(args.folder, readers, device.type == "cuda"))
    link = best(args.repeats, parallel, host_link(device))
    return Measured(link, cache, first, loaded, seconds, resident, pinned)


def table(ranks: list[Measured]) -> Iterator[str]:
    names = "".join(f"{name:>12}" for name in ("host link", "page cache", "first load", "loaded"))
    yield f"rank {names} {'seconds':>8} {'resident':>10} {'pinned':>9}"
    for rank, m in enumerate(ranks):
        rates = "".join(f"{rate:7.1f} GB/s" for rate in (m.link, m.cache, m.first, m.loaded))
        yield f"{rank:4} {rates} {m.seconds:8.2f} {m.resident:6d} MiB {m.pinned:5d} MiB"
    sums = [sum(getattr(m, key) for m in ranks) for key in ("link", "cache", "first", "loaded")]
    yield f"all  {''.join(f'{rate:7.1f} GB/s' for rate in sums)} {max(m.seconds for m in ranks):8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint; made when there is none")
    parser.add_argument("--file-gib", type=float, default=5.0)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; another than the checkpoint's is cast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--readers", type=int, default=loader.MAX_READERS, help="threads of a rank, at most")
    parser.add_argument("--piece-mib", type=float, default=loader.PIECE_BYTES / (1 << 20))
    args, words = parser.parse_known_args()
    loader.MAX_READERS, loader.PIECE_BYTES = args.readers, int(args.piece_mib * (1 << 20))
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", "0")) if args.device == "cuda" else None)
    parallel = init_distributed(device)
    if parallel.rank == 0 and not (args.folder / checkpoint.INDEX).exists():
        model = compose([*words, "input=sample"], planning=True).model
        make_checkpoint(args.folder, load_shape(model), model.architecture, int(args.file_gib * (1 << 30)))
    together(parallel)
    ranks: list[Any] = [measure(args, words, parallel, device)]
    if parallel.size > 1:
        mine, ranks = ranks[0], [None] * parallel.size
        dist.all_gather_object(ranks, mine, group=parallel.host_group)
    if parallel.rank == 0:
        print(
            f"{sys.argv[0]}: {usable_cores()} cores, {min(loader.MAX_READERS, usable_cores())} readers a rank, pieces of "
            f"{loader.PIECE_BYTES / (1 << 20):g} MiB, {args.device}, torch {torch.__version__}"
        )
        print("\n".join(table(ranks)))
    parallel.close()


if __name__ == "__main__":
    main()
