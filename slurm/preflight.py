"""Is this node what the tier says? Drivers, GPUs, links, all-reduce, host copies and disks, a line each, in about a minute.

    python slurm/preflight.py hw=h200x2 model.path=/data/llama-2-13b-hf output.dir=/scratch/runs/one
    srun --gpus-per-node=4 --cpus-per-task=32 --mem=240G python slurm/preflight.py hw=a100x4 model=llama13b model.path=/data/13b
    sbatch --gpus-per-node=4 --cpus-per-task=32 --mem=240G --wrap "python slurm/preflight.py hw=a100x4"

Takes the overrides that a run takes. `ok` is as it should be; `slow` works, and says what could be better; `FAILED` would stop a
run. Exit code 1: something FAILED; 2: the request is wrong. Everything runs with the environment of the tier (hw.env).
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import batchinfer
from batchinfer import hardware, topology
from batchinfer.compose import compose
from batchinfer.config import Config, ConfigError
from batchinfer.hardware import GIB, VisibleGPU
from batchinfer.job.process import MARK, command_of_child, kill_marked
from batchinfer.job.replica import last_words, torchrun
from batchinfer.publish import probe, publish_bytes

OK, SLOW, FAILED = "ok", "slow", "FAILED"
MIB = 1 << 20
DEVICES_TIMEOUT_S = 90.0  # importing torch in every rank included
# GB/s each way of one GPU's NVLinks together: A100 and H100 datasheets, half of the sum of both directions.
NVLINK_GB_S = {"a100-80gb": 300, "h100": 450, "h200": 450}
PCIE_LANE_GB_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # by generation, less the encoding
GOOD_SHARE = 0.5  # of a link's rate; NCCL and a copy from pinned memory reach two thirds and more
PCIE_BUS_GB_S = 4.0  # all-reduce through host memory over eight lanes of PCIe 3.0; less is a fault
SMALL_US = 100.0  # an all-reduce of 8 KiB; sixty and more of them make a token
LOADING_S = 60.0  # for all weights
WRITE_MB_S, COMMIT_MS = 50.0, 250.0
BUSY_BYTES = 2 * GIB  # more than a driver keeps for itself
READ_S = 5.0
CHUNK = 8 * MIB


@dataclass(frozen=True)
class Check:
    verdict: str
    what: str
    found: str
    todo: str = ""
    below: tuple[str, ...] = ()

    def lines(self) -> str:
        line = f"{self.verdict:<7} {self.what:<11} {self.found}{f'  ->  {self.todo}' if self.todo else ''}"
        return "\n".join([line, *(f"{'':<20}{text}" for text in self.below)])


def check_driver(gpus: Sequence[VisibleGPU], on_gpu: bool) -> Check:
    """Whether the driver is there and is new enough for this PyTorch."""
    torch_version, built_for = torch_build()
    if not on_gpu:
        return Check(OK, "driver", f"none needed on a CPU; PyTorch {torch_version}")
    if not gpus:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        todo = "see whether nvidia-smi works, or choose hw=cpu" if mask is None else f"CUDA_VISIBLE_DEVICES={mask} shows none"
        return Check(FAILED, "driver", "NVML finds no GPU", todo)
    with nvml_session() as nvml:
        driver, number = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()
    found = f"{driver}, CUDA up to {number // 1000}.{number % 1000 // 10}; PyTorch {torch_version} for CUDA {built_for}"
    if built_for is None:
        return Check(FAILED, "driver", found, "this PyTorch is built for CPUs only: install one that is built for CUDA")
    if int(built_for.split(".")[0]) > number // 1000:
        return Check(FAILED, "driver", found, "the driver is too old: update it, or install a PyTorch for its CUDA")
    return Check(OK, "driver", found)


def torch_build() -> tuple[str, str | None]:
    """Version of PyTorch and of the CUDA that it is built for, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ConfigError("PyTorch is not installed here")
    told = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return told["__version__"], told["cuda"]


class nvml_session:
    def __enter__(self) -> Any:
        import pynvml

        pynvml.nvmlInit()
        self.nvml = pynvml
        return pynvml

    def __exit__(self, *_: object) -> None:
        self.nvml.nvmlShutdown()


def check_host(config: Config) -> Check:
    cores, hw = hardware.usable_cores(), config.hw
    found = f"{socket.gethostname()}: {cores:,} cores, {hardware.available_memory() / GIB:,.0f} GiB of memory free"
    wanted = (hw.cpus_per_gpu or 1) * hw.gpus_per_node
    if cores < wanted:
        return Check(SLOW, "host", found, f"the tier counts on {wanted} cores: ask for --cpus-per-task={wanted}")
    return Check(OK, "host", found)


def check_gpus(config: Config, gpus: Sequence[VisibleGPU]) -> Check:
    """Number, kind and health."""
    hw, kinds = config.hw, sorted({gpu.gpu for gpu in gpus})
    smallest = min(gpu.memory_bytes for gpu in gpus)
    found = f"{len(gpus)} x {' and '.join(kinds)}, {smallest / GIB:,.1f} GiB"
    if len(gpus) < hw.gpus_per_node:
        todo = f"the tier has {hw.gpus_per_node}: ask for as many (--gpus-per-node), or choose another hw"
        return Check(FAILED, "gpus", found, todo)
    if hw.gpu not in ("auto", *kinds):
        return Check(FAILED, "gpus", found, f"the tier's are {hw.gpu}: choose hw=auto, or another node")
    with nvml_session() as nvml:
        troubles = [trouble for number, gpu in enumerate(gpus) for trouble in _troubles(nvml, number, gpu)]
    worst = FAILED if any(verdict == FAILED for verdict, _ in troubles) else SLOW
    return Check(worst, "gpus", found, "; ".join(text for _, text in troubles)) if troubles else Check(OK, "gpus", found)


def _troubles(nvml: Any, number: int, gpu: VisibleGPU) -> Iterator[tuple[str, str]]:
    """What the driver has to complain of. It keeps some of it to itself for slices, GeForce and virtual GPUs."""
    handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
    kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    errors = told(nvml, lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, *kinds))
    if errors:
        yield FAILED, f"GPU {number} had {errors:,} uncorrectable memory errors: have it reset, or drain the node"
    reasons = told(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    slowdowns = {
        "HwSlowdown": "a slowdown",
        "HwThermalSlowdown": "heat",
        "SwThermalSlowdown": "heat",
        "HwPowerBrakeSlowdown": "power",
    }
    causes = dict.fromkeys(
        cause for name, cause in slowdowns.items() if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}")
    )
    if causes:
        yield SLOW, f"GPU {number} is throttled by {' and '.join(causes)}: see nvidia-smi -q -d PERFORMANCE"
    used = told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used) or 0
    if used > BUSY_BYTES:
        yield SLOW, f"GPU {number} has {used / GIB:,.1f} GiB in use already: see nvidia-smi for by whom"


def told(nvml: Any, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except nvml.NVMLError:
        return None


def check_links(config: Config, links: Sequence[topology.Link]) -> Check:
    if not links:
        return Check(OK, "links", "one GPU: nothing to connect")
    names = sorted({link.name for link in links})
    found = f"{' and '.join(names)} between {'the two' if len(links) == 1 else 'them' if len(names) > 1 else 'every two'}"
    below = tuple(topology.matrix(links)) if len(names) > 1 else ()
    if any(link.path == "MIG" for link in links):
        return Check(SLOW, "links", "slices of a cut-up GPU cannot talk", "only replicas of one: hw.tensor_parallel=1")
    if all(link.peer is None for link in links):
        return Check(OK, "links", f"{found}, as far as the driver says: all-reduce shows it", below=below)
    if config.hw.interconnect == "nvlink" and topology.interconnect(links) != "nvlink":
        return Check(SLOW, "links", found, "the tier has NVLink between all: choose hw=auto, or another node", below)
    return Check(OK, "links", found, below=below)


def check_devices(config: Config, ranks: int, on_gpu: bool, links: Sequence[topology.Link]) -> Iterator[Check]:
    """What all ranks reach together, each in a process of its own as in a run."""
    if ranks == 1 and not on_gpu:
        yield Check(OK, "all-reduce", "one process: nothing to reduce")
        return
    found, why = run_devices(config, ranks, "cuda" if on_gpu else "cpu")
    if found is None:
        todo = "hw.env.NCCL_DEBUG=INFO tells more; GPUs that only seem to reach each other need hw.env.NCCL_P2P_DISABLE=1"
        yield Check(FAILED, "all-reduce" if ranks > 1 else "devices", str(why), todo if ranks > 1 and on_gpu else "")
        return
    if ranks > 1:
        yield check_all_reduce(ranks, on_gpu, topology.interconnect(links), found)
    if on_gpu:
        yield check_copies(found["copies"])
        missing = found["kernels_missing"]
        yield Check(FAILED, "kernels", missing) if missing else Check(OK, "kernels", "the compiled kernels load")


def run_devices(config: Config, ranks: int, kind: str) -> tuple[dict[str, Any] | None, str | None]:
    """The figures of `preflight_devices.py`, or why there are none."""
    script = Path(__file__).with_name("preflight_devices.py")
    mark = f"preflight:{secrets.token_hex(8)}"
    root = str(Path(batchinfer.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    extra = {name: str(value) for name, value in config.hw.env.items()}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **extra, "PYTHONPATH": path, MARK: mark}
    with tempfile.TemporaryDirectory(prefix="batchinfer-preflight-") as folder, open(f"{folder}/log", "w+b") as log:
        figures = Path(folder) / "figures.json"
        command = command_of_child([*torchrun(ranks, Path(folder)), str(script), kind, str(figures)])
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(DEVICES_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None, f"{ranks} processes were not done after {DEVICES_TIMEOUT_S:,.0f} s"
        finally:
            kill_marked(mark)
            process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
        return (json.loads(figures.read_bytes()), None) if code == 0 else (None, last_words(said) or f"exit code {code}")


def check_all_reduce(ranks: int, on_gpu: bool, interconnect: str | None, found: dict[str, Any]) -> Check:
    times = found["all_reduce"]
    text = f"{ranks} ranks: " + ", ".join(_timed(ranks, num_bytes, seconds) for num_bytes, seconds in times)
    if not found["right"]:
        return Check(FAILED, "all-reduce", text, "sums are WRONG: drain the node")
    if not on_gpu:
        return Check(OK, "all-reduce", text)
    nvlink = min(NVLINK_GB_S.get(gpu.gpu, 0) for gpu in hardware.visible_gpus())
    least = GOOD_SHARE * nvlink if interconnect == "nvlink" else PCIE_BUS_GB_S
    if bus_gb_s(ranks, *times[-1]) < least:
        todo = f"{least:,.0f} GB/s and more can be had over {interconnect}: hw.env.NCCL_DEBUG=INFO tells the way it takes"
        return Check(SLOW, "all-reduce", text, todo)
    if 1e6 * times[0][1] > SMALL_US:
        return Check(SLOW, "all-reduce", text, f"the smallest can take less than {SMALL_US:,.0f} us: are cores short, or in use?")
    return Check(OK, "all-reduce", text)


def bus_gb_s(ranks: int, num_bytes: int, seconds: float) -> float:
    """What each link carries, whatever the number of ranks (NCCL tests, doc/PERFORMANCE.md)."""
    return 2 * (ranks - 1) / ranks * num_bytes / seconds / 1e9


def _timed(ranks: int, num_bytes: int, seconds: float) -> str:
    size = f"{num_bytes >> 20} MiB" if num_bytes >= MIB else f"{num_bytes >> 10} KiB"
    return f"{size} {1e6 * seconds:,.0f} us" if num_bytes < MIB else f"{size} {bus_gb_s(ranks, num_bytes, seconds):,.1f} GB/s"


def check_copies(copies: Sequence[tuple[float, float]]) -> Check:
    """From pinned memory: how fast weights can come in."""
    alone, together = min(rate for rate, _ in copies) / 1e9, sum(rate for _, rate in copies) / 1e9
    beside = f", {together:,.1f} GB/s to all at once" if len(copies) > 1 else ""
    lanes = _pcie_gb_s()
    found = f"{alone:,.1f} GB/s to {'the slowest GPU' if len(copies) > 1 else 'the GPU'}{beside}"
    if lanes is not None and alone < GOOD_SHARE * lanes:
        return Check(
            SLOW,
            "host copy",
            found,
            f"its PCIe slot could carry {lanes:,.0f} GB/s: does it run with fewer lanes, or is the host busy?",
        )
    return Check(OK, "host copy", found)


def _pcie_gb_s() -> float | None:
    """Of the slowest visible GPU, as far as board and slot go; None where the driver does not say."""
    with nvml_session() as nvml:
        rates = []
        for gpu in hardware.visible_gpus():
            handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
            generation = told(nvml, lambda handle=handle: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))  # type: ignore[misc]
            width = told(nvml, lambda handle=handle: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))  # type: ignore[misc]
            rates.append(PCIE_LANE_GB_S.get(generation, 0.0) * (width or 0))
    return min(rates, default=0.0) or None


def check_checkpoint(config: Config) -> Check:
    """How fast one reader gets the weights."""
    if config.model.load_format == "random" or config.model.path is None:
        return Check(OK, "checkpoint", "none to read: random weights, or no model.path")
    files = sorted(Path(config.model.path).glob("*.safetensors"), key=lambda file: file.stat().st_size)
    if not files:
        return Check(FAILED, "checkpoint", f"{config.model.path} holds no *.safetensors", "mend model.path, as this node sees it")
    try:
        total, rate = sum(file.stat().st_size for file in files), read_rate(files[-1])
    except OSError as error:
        return Check(FAILED, "checkpoint", f"{error.filename}: {error.strerror}", "mend model.path, as this node sees it")
    found = f"{config.model.path}: {total / 1e9:,.2f} GB, read at {rate / 1e9:,.2f} GB/s"
    if total / rate > LOADING_S:
        return Check(SLOW, "checkpoint", found, f"loading takes {total / rate:,.0f} s: copy it to a faster file system")
    return Check(OK, "checkpoint", found)


def read_rate(path: Path) -> float:
    """Bytes per second of reading from the beginning on, for some seconds, not from the page cache as far as it lets go."""
    buffer, count = bytearray(CHUNK), 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        while (got := file.readinto(buffer)) and time.perf_counter() - begin < READ_S:
            count += got
        return count / (time.perf_counter() - begin)


def check_output(config: Config, num_bytes: int) -> Check:
    """Whether runs can live there, and how fast. Leaves nothing behind."""
    wanted = Path(str(config.output.dir)).absolute()
    place = next(folder for folder in (wanted, *wanted.parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".preflight-", dir=place) as name:
            return _try_output(place, Path(name), num_bytes)
    except (ConfigError, OSError) as error:
        return Check(FAILED, "output", f"{place}: {error}", "choose another output.dir")


def _try_output(place: Path, folder: Path, num_bytes: int) -> Check:
    probe(folder)
    written = write_rate(folder / "sequential", num_bytes)
    read = read_rate(folder / "sequential")
    begin = time.perf_counter()
    for number in range(10):
        publish_bytes(folder / f"unit{number}", b"x")
    commit_ms = 1e3 * (time.perf_counter() - begin) / 10
    ways = f"{'hard links' if has_links(folder) else 'no hard links, but exclusive renames'}, a commit takes {commit_ms:,.1f} ms"
    found = f"{place}: {written / 1e9:,.2f} GB/s written, {read / 1e9:,.2f} GB/s read, {ways}"
    if written < WRITE_MB_S * 1e6 or commit_ms > COMMIT_MS:
        return Check(SLOW, "output", found, "the run waits for it only at commits; larger input.rows_per_unit makes those fewer")
    return Check(OK, "output", found)


def write_rate(path: Path, num_bytes: int) -> float:
    """Bytes per second, until they are on the disk."""
    chunk = os.urandom(min(CHUNK, num_bytes))  # nothing that a file system could squeeze
    begin = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(max(1, num_bytes // len(chunk))):
            file.write(chunk)
        os.fsync(file.fileno())
    return path.stat().st_size / (time.perf_counter() - begin)


def has_links(folder: Path) -> bool:
    try:
        os.link(folder / "sequential", folder / "linked")
    except OSError:
        return False
    return True


def checks(config: Config, disk_bytes: int) -> Iterator[Check]:
    """In an order in which the first that FAILED explains those after it."""
    gpus = [] if config.hw.gpu is None else hardware.visible_gpus()
    on_gpu = config.hw.gpu is not None and (bool(gpus) or config.hw.gpu != "auto")
    yield check_host(config)
    yield check_driver(gpus, on_gpu)
    if gpus:
        yield check_gpus(config, gpus)
    links = topology.visible_links() if gpus else []
    if gpus:
        yield check_links(config, links)
    if gpus or not on_gpu:
        able = 1 if any(map(topology.is_slice, gpus)) else config.hw.gpus_per_node
        yield from check_devices(config, min(able, len(gpus)) if gpus else able, on_gpu, links)
    yield check_checkpoint(config)
    yield check_output(config, disk_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk-mib", type=int, default=512, help="how much is written to the output folder, and read back")
    parser.add_argument("overrides", nargs="*", help="as a run takes them")
    asked = parser.parse_args(argv)
    verdicts = []
    try:
        for check in checks(compose(asked.overrides, planning=True), asked.disk_mib * MIB):
            print(check.lines(), flush=True)
            verdicts.append(check.verdict)
    except ConfigError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2
    failed, slow = verdicts.count(FAILED), verdicts.count(SLOW)
    print(f"preflight: {failed} FAILED, {slow} slow, {verdicts.count(OK)} ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
