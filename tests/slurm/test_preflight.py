"""Preflight on this CPU from end to end, and what it says of hosts that the tests make up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batchinfer import hardware, topology
from batchinfer.compose import compose
from batchinfer.config import Config
from batchinfer.hardware import GIB
from slurm import preflight
from tests.nvml import Driver

MIB = 1 << 20


def test_a_cpu_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--disk-mib", "4", "hw=cpu", "hw.gpus_per_node=2", "hw.cpus_per_gpu=1", f"output.dir={tmp_path}/runs/one"]
    assert preflight.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["host", "driver", "all-reduce", "checkpoint", "output"]
    assert all(line.split()[0] in ("ok", "slow") for line in lines[:-1])
    assert "2 ranks: 8 KiB " in lines[2] and lines[2].endswith(" GB/s")
    assert "tiny/model: 0.01 GB, read at" in lines[3] and f"{tmp_path}: " in lines[4] and "hard links" in lines[4]
    assert lines[-1].startswith("preflight: 0 FAILED, ")
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(["hw=h200x9"]) == 2
    assert capsys.readouterr().err.startswith("preflight: hw=h200x9: no such choice;")


def test_what_would_stop_a_run_is_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    words = ["--disk-mib", "1", "hw=h200x2", "model=llama7b", f"model.path={tmp_path}", f"output.dir={tmp_path}/x"]
    assert preflight.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED  driver      NVML finds no GPU  ->  ") for line in lines)
    assert any(line.startswith(f"FAILED  checkpoint  {tmp_path} holds no *.safetensors  ->  ") for line in lines)
    assert lines[-1].startswith("preflight: 2 FAILED")


# --- GPUs


class Host(Driver):
    """With what preflight asks beside: `complaints` by UUID hold errors, throttle (a mask) and used bytes."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x8, 0x80
    nvmlClocksThrottleReasonSwThermalSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown = 0x20, 0x40

    def __init__(self, name: str, gib: float, count: int) -> None:
        super().__init__(*({"name": name, "uuid": f"GPU-{i}a", "gib": gib} for i in range(count)))
        self.complaints: dict[str, dict[str, int]] = {}
        self.cuda = 13000

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self.cuda

    def told(self, device: dict[str, Any], name: str) -> int:
        return self.complaints.get(device["uuid"], {}).get(name, 0)

    def nvmlDeviceGetTotalEccErrors(self, device: dict[str, Any], kind: int, counter: int) -> int:
        if "GeForce" in device["name"]:
            raise self.NVMLError
        return self.told(device, "errors")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: dict[str, Any]) -> int:
        return 1 | self.told(device, "throttle")  # 1: the GPU is idle

    def nvmlDeviceGetMemoryInfo(self, device: dict[str, Any]) -> Any:
        return SimpleNamespace(total=device["gib"] * GIB, used=self.told(device, "used"))

    def nvmlDeviceGetMaxPcieLinkGeneration(self, device: dict[str, Any]) -> int:
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, device: dict[str, Any]) -> int:
        return 16


def host(monkeypatch: pytest.MonkeyPatch, name: str, gib: float, count: int) -> Host:
    found = Host(name, gib, count)
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def on(tier: str) -> Config:
    return compose([f"hw={tier}", "model=llama7b"], planning=True)


def gpus(tier: str) -> str:
    return preflight.check_gpus(on(tier), hardware.visible_gpus()).lines()


def test_gpus_against_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA H200", 140, 2)
    assert gpus("h200x2") == "ok      gpus        2 x h200, 140.0 GiB" == gpus("auto")
    assert gpus("h200x8").startswith("FAILED  gpus        2 x h200, 140.0 GiB  ->  the tier has 8: ask for as many")
    assert gpus("rtx4090x2").startswith("FAILED  gpus        2 x h200, 140.0 GiB  ->  the tier's are rtx4090:")
    driver.complaints["GPU-1a"] = {"throttle": 0x40, "used": 3 * GIB}
    assert gpus("h200x2").startswith("slow    gpus        2 x h200, 140.0 GiB  ->  GPU 1 is throttled by heat: see")
    assert "GPU 1 has 3.0 GiB in use already" in gpus("h200x2")
    driver.complaints["GPU-0a"] = {"errors": 5}
    assert "FAILED" in gpus("h200x2") and "GPU 0 had 5 uncorrectable memory errors" in gpus("h200x2")
    assert driver.open == 0


def test_geforce_keeps_its_errors_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA GeForce RTX 4090", 23.99, 2)
    assert gpus("rtx4090x2").startswith("ok ")


def test_the_driver_against_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA H200", 140, 1)

    def said(built_for: str | None) -> str:
        monkeypatch.setattr(preflight, "torch_build", lambda: ("2.11", built_for))
        return preflight.check_driver(hardware.visible_gpus(), True).lines()

    assert said("13.0") == "ok      driver      580.1, CUDA up to 13.0; PyTorch 2.11 for CUDA 13.0"
    assert said(None).startswith("FAILED") and said(None).endswith("install one that is built for CUDA")
    driver.cuda = 12080
    assert said("12.9").startswith("ok ") and "CUDA up to 12.8" in said("12.9")  # minor versions get on with each other
    assert "the driver is too old" in said("13.0")


def test_pytorch_is_described_without_being_imported() -> None:
    import torch

    assert preflight.torch_build() == (torch.__version__, torch.version.cuda)


def links(tier: str) -> str:
    return preflight.check_links(on(tier), topology.visible_links()).lines()


def test_links_against_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA A100-SXM4-80GB", 80, 4)
    pairs = {frozenset((f"GPU-{i}a", f"GPU-{j}a")) for i in range(4) for j in range(i)}
    driver.nvlink = pairs
    assert links("a100x4") == "ok      links       NVLink between every two"
    driver.nvlink = pairs - {frozenset(("GPU-0a", "GPU-3a"))}
    first, *table = links("a100x4").splitlines()
    assert first.startswith("slow    links       NVLink and SYS, through host memory between them  ->  the tier has NVLink")
    assert [line.split() for line in table][1] == ["GPU", "0", "-", "NVLink", "NVLink", "SYS"]
    driver.silent = True
    assert links("a100x4").startswith("ok ") and links("a100x4").endswith("all-reduce shows it")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert links("h200x1").endswith("one GPU: nothing to connect")


def test_links_of_two_4090_are_as_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA GeForce RTX 4090", 23.99, 2)
    assert links("rtx4090x2") == "ok      links       SYS, through host memory between the two"


def all_reduce(interconnect: str, seconds: float, small_us: float = 20, right: bool = True) -> str:
    found = {"all_reduce": [[8 << 10, small_us * 1e-6], [256 * MIB, seconds]], "right": right}
    return preflight.check_all_reduce(2, True, interconnect, found).lines()


def test_all_reduce_is_judged_by_the_links(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA H200", 140, 2)
    second = 256 * MIB / 1e9  # of a message at 1 GB/s; two ranks carry each byte once
    assert all_reduce("nvlink", second / 330).endswith("2 ranks: 8 KiB 20 us, 256 MiB 330.0 GB/s")
    assert all_reduce("nvlink", second / 200).startswith("slow") and "225 GB/s and more can be had" in all_reduce(
        "nvlink", second / 200
    )
    assert all_reduce("pcie", second / 10).startswith("ok ") and all_reduce("pcie", second / 2).startswith("slow ")
    assert "less than 100 us" in all_reduce("nvlink", second / 330, small_us=150)
    assert all_reduce("nvlink", second / 330, right=False).startswith("FAILED")
    assert preflight.bus_gb_s(4, 10**9, 1.0) == 1.5


def test_copies_are_judged_by_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA H200", 140, 2)
    good = preflight.check_copies([(26e9, 24e9), (25e9, 24e9)]).lines()
    assert good == "ok      host copy   25.0 GB/s to the slowest GPU, 48.0 GB/s to all at once"
    assert "its PCIe slot could carry 32 GB/s" in preflight.check_copies([(12e9, 12e9)]).lines()


# --- processes and disks


def test_ranks_that_die_or_hang_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["hw=cpu", "hw.env.GLOO_SOCKET_IFNAME=nowhere0"])
    (check,) = preflight.check_devices(config, 2, False, [])
    assert check.verdict == preflight.FAILED and check.what == "all-reduce" and "nowhere0" in check.found
    monkeypatch.setattr(preflight, "DEVICES_TIMEOUT_S", 0.5)
    assert preflight.run_devices(compose(["hw=cpu"]), 2, "cpu") == (None, "2 processes were not done after 0 s")
    assert preflight.kill_marked("preflight:", 0.0) == []


def test_a_folder_that_cannot_hold_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([f"output.dir={tmp_path}/x"])
    assert preflight.check_output(config, MIB).verdict in (preflight.OK, preflight.SLOW)

    def no_links(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(preflight.os, "link", no_links)
    assert "no hard links, but exclusive renames" in preflight.check_output(config, MIB).lines()
    monkeypatch.setattr(preflight, "probe", no_links)
    assert preflight.check_output(config, MIB).lines().startswith(f"FAILED  output      {tmp_path}: ")
    assert list(tmp_path.iterdir()) == []


def test_slow_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    config = compose([f"model.path={tmp_path}", f"output.dir={tmp_path}"])
    monkeypatch.setattr(preflight, "read_rate", lambda path: 10.0)
    assert "loading takes 100 s" in preflight.check_checkpoint(config).lines()
    monkeypatch.setattr(preflight, "write_rate", lambda path, num_bytes: path.write_bytes(b"x") * 1e6)
    assert preflight.check_output(config, MIB).lines().startswith("slow    output")


def test_rates_are_of_what_was_written(tmp_path: Path) -> None:
    assert preflight.write_rate(tmp_path / "x", 3 * MIB) > 0 and (tmp_path / "x").stat().st_size == 3 * MIB
    assert preflight.read_rate(tmp_path / "x") > 0
