"""What `hw=auto` finds on hosts of all kinds, through a driver of straw."""

from __future__ import annotations

import sys
from itertools import combinations
from typing import Any

import pytest

from batchinfer import topology
from batchinfer.compose import compose, overlay
from batchinfer.config import Config
from batchinfer.job.layout import resolve_gpu
from tests.nvml import Driver


def host(monkeypatch: pytest.MonkeyPatch, name: str, gib: float, count: int, mask: str | None = None) -> Driver:
    """`count` GPUs alike, with the UUIDs GPU-0a, GPU-1a, ..., no two of which reach each other."""
    found = Driver(*({"name": name, "uuid": f"GPU-{i}a", "gib": gib} for i in range(count)))
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    return found


def all_pairs(driver: Driver) -> set[frozenset[str]]:
    return {frozenset((a["uuid"], b["uuid"])) for a, b in combinations(driver.gpus, 2)}


def auto(*overrides: str) -> Config:
    return compose(["hw=auto", "model=llama7b", *overrides], planning=True)


def test_two_4090(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA GeForce RTX 4090", 23.99, 2)
    hw = auto().hw
    assert (hw.gpus_per_node, hw.interconnect) == (2, "pcie")
    assert hw.env == {"NCCL_DEBUG": "WARN", "NCCL_P2P_DISABLE": "1"} == compose(["hw=rtx4090x2"]).hw.env
    (link,) = topology.visible_links()
    assert (link.path, link.peer, link.name) == ("SYS", False, "SYS, through host memory") and driver.open == 0


def test_four_a100_over_nvlink(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA A100-SXM4-80GB", 80, 4)
    driver.nvlink = all_pairs(driver)
    hw = auto().hw
    assert (hw.gpus_per_node, hw.interconnect) == (4, "nvlink") and "NCCL_P2P_DISABLE" not in hw.env
    assert len(topology.visible_links()) == 6 and {link.name for link in topology.visible_links()} == {"NVLink"}


def test_one_gpu_has_nobody_to_talk_to(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA H200", 140, 1)
    assert (auto().hw.gpus_per_node, auto().hw.interconnect, auto().hw.env) == (1, None, {})


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    assert (auto().hw.gpus_per_node, auto().hw.interconnect, auto().hw.env) == (1, None, {})


def test_peers_over_pcie_stay_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA A100-PCIE-40GB", 40, 2)
    driver.peers = all_pairs(driver)
    for gpu in driver.gpus:
        gpu["switch"] = "a"
    assert auto().hw.interconnect == "pcie" and auto().hw.env == {"NCCL_DEBUG": "WARN"}
    assert [link.name for link in topology.visible_links()] == ["PIX"]


def test_the_slowest_pair_counts_and_bridges_stay_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA A100-PCIE-80GB", 80, 4)
    driver.nvlink = {frozenset(("GPU-0a", "GPU-1a")), frozenset(("GPU-2a", "GPU-3a"))}
    assert auto().hw.interconnect == "pcie"
    assert "NCCL_P2P_DISABLE" not in auto().hw.env  # it would switch the bridges off too
    assert list(topology.matrix(topology.visible_links())) == [
        "       GPU 0   GPU 1   GPU 2   GPU 3",
        "GPU 0  -       NVLink  SYS     SYS",
        "GPU 1  NVLink  -       SYS     SYS",
        "GPU 2  SYS     SYS     -       NVLink",
        "GPU 3  SYS     SYS     NVLink  -",
    ]


@pytest.mark.parametrize(
    ("mask", "links"),
    [
        ("0,1", ["NVLink"]),
        ("1,2", ["SYS"]),
        ("GPU-2,GPU-3a", ["NVLink"]),
        ("GPU-3a,GPU-0a,GPU-2a", ["SYS", "NVLink", "SYS"]),
        ("2", []),
        ("", []),
    ],
)
def test_only_links_between_visible_gpus_count(monkeypatch: pytest.MonkeyPatch, mask: str, links: list[str]) -> None:
    driver = host(monkeypatch, "NVIDIA A100-PCIE-80GB", 80, 4, mask)
    driver.nvlink = {frozenset(("GPU-0a", "GPU-1a")), frozenset(("GPU-2a", "GPU-3a"))}
    assert [link.path for link in topology.visible_links()] == links
    assert auto().hw.interconnect == {"NVLink": "nvlink", "SYS": "pcie", None: None}[links[0] if links else None]


def slices(driver: Driver) -> None:
    names = [("MIG-x", 20), ("MIG-y", 20)]
    cut: list[dict[str, Any]] = [{"name": "NVIDIA H100 80GB HBM3 MIG 2g.20gb", "uuid": uuid, "gib": gib} for uuid, gib in names]
    driver.gpus[0]["slices"] = cut


def test_a_mig_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    slices(host(monkeypatch, "NVIDIA H100 80GB HBM3", 80, 1, "MIG-y"))
    assert (auto().hw.gpus_per_node, auto().hw.interconnect, auto().hw.env) == (1, None, {})


def test_slices_map_nobodys_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    slices(host(monkeypatch, "NVIDIA H100 80GB HBM3", 80, 1, "MIG-x,MIG-y"))
    assert (auto().hw.gpus_per_node, auto().hw.interconnect, auto().hw.env["NCCL_P2P_DISABLE"]) == (2, "pcie", "1")


def test_what_the_driver_does_not_say_is_left_to_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA H200", 140, 2).silent = True
    assert auto().hw.interconnect == "pcie" and auto().hw.env == {"NCCL_DEBUG": "WARN"}
    assert [(link.path, link.peer) for link in topology.visible_links()] == [("PCIe", None)]


def test_what_is_asked_for_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA GeForce RTX 4090", 24, 2)
    assert auto("hw.interconnect=nvlink", "hw.env.NCCL_P2P_DISABLE=0", "hw.env.A=1").hw.interconnect == "nvlink"
    assert auto("hw.env.NCCL_P2P_DISABLE=0", "hw.env.A=1").hw.env == {"NCCL_DEBUG": "WARN", "NCCL_P2P_DISABLE": 0, "A": 1}
    assert compose(["hw=h200x2"]).hw.interconnect == "nvlink"  # a tier with a name says itself what it is


def test_of_different_gpus_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host(monkeypatch, "NVIDIA H200", 140, 2)
    driver.gpus[1].update(name="NVIDIA A100-SXM4-80GB", gib=80)
    config = auto("hw.tensor_parallel=2")
    assert resolve_gpu(config.hw).gpu == "a100-80gb"


def test_a_run_that_moves_to_this_host_finds_its_links(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "NVIDIA GeForce RTX 4090", 24, 2)
    moved = overlay(compose(["hw=h200x2"]), ["hw=auto"], ("hw",))
    assert moved.hw.interconnect == "pcie" and moved.hw.env["NCCL_P2P_DISABLE"] == "1"
