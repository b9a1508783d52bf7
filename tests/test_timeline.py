"""The window of a profile: intervals, idle time, whose an overlap is, and categories by real names of kernels."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from batchinfer.timeline import (
    CATEGORY_NAMES,
    IDLE,
    WINDOW,
    Event,
    Trace,
    break_down,
    category,
    device_times,
    gaps,
    host_times,
    read_trace,
    union,
)

FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t>, true>"
FUNCTOR = "void at::native::vectorized_elementwise_kernel<4, at::native::{}, std::array<char*, 3ul> >(int, {})"
NAMES = {
    "GEMM": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_sm90_tst_128x16_64x11_4x1_v_bz_splitK_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>(cutlass_80::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, false, false>(int)",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, float, false>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>(float)",
        "void batchinfer::(anonymous namespace)::skinny_linear_kernel<__nv_bfloat16, 4>(__nv_bfloat16*, int)",
        "aten::mm",
        "aten::addmm",
    ],
    "attention": [
        f"{FLASH}(pytorch_flash::Flash_fwd_params)",
        "void pytorch_flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>, 4, 7, true>(Params)",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float, SoftMaxForwardEpilogue>(float*)",
        "void batchinfer::(anonymous namespace)::decode_attention_kernel<__nv_bfloat16, 128>(DecodePlan, __nv_bfloat16 const*)",
        "void batchinfer::tile_attention_wgmma_kernel<__half, 64>(batchinfer::TileAttention, CUtensorMap_st)",
        "void batchinfer::(anonymous namespace)::tile_attention_mma_kernel<__half, 64>(batchinfer::TileAttention)",
        "batchinfer::combine_attention_kernel(float const*, float const*)",
        "void batchinfer::(anonymous namespace)::online_softmax_kernel<float>(float*)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "sampling": [
        "void batchinfer::(anonymous namespace)::greedy_kernel<__nv_bfloat16>(__nv_bfloat16 const*)",
        "void batchinfer::(anonymous namespace)::sample_kernel<float>(float const*, SampleArguments)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>, unsigned int, long> >",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy900, true, float, long, unsigned int>(float*)",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(at::cuda::detail::TensorInfo<float const>)",
        "void at::native::tensor_kernel_scan_innermost_dim<float, std::plus<float> >(float*, float const*, unsigned int)",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, LogSoftMaxForwardEpilogue>(float*)",
    ],
    "norms and elementwise": [
        "void batchinfer::(anonymous namespace)::silu_and_mul_kernel<__nv_bfloat16>(__nv_bfloat16*, __nv_bfloat16 const*, long)",
        "void batchinfer::(anonymous namespace)::short_norm_kernel<__half, true>(__half*, CopyPlan)",
        "void batchinfer::(anonymous namespace)::rope_by_element_kernel<__nv_bfloat16>(__nv_bfloat16*)",
        "void batchinfer::(anonymous namespace)::embedding_kernel<__nv_bfloat16>(__nv_bfloat16*, int const*)",
        FUNCTOR.format("CUDAFunctor_add<c10::BFloat16>", "CUDAFunctor_add<c10::BFloat16>"),
        FUNCTOR.format("(anonymous namespace)::silu_kernel(at::TensorIteratorBase&)::{lambda()#1}", "int"),
        FUNCTOR.format("FillFunctor<int>", "FillFunctor<int>"),
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float> > >",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, true>(int, float)",
        "aten::mul",
    ],
    "copies": [
        "batchinfer::(anonymous namespace)::feed_tokens_kernel(int*, int const*, int const*, int)",
        "Memcpy DtoH (Device -> Pinned)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()}>",
        "void at::native::elementwise_kernel<128, 4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>(int)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 3, 64, 64>",
        "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_kernel_impl> >(int)",
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>",
        "void at_cuda_detail::cub::detail::select::DeviceSelectSweepKernel<policy_hub<long, bool, int, false, true> >(long*)",
        "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long, long, long, bool)",
        "aten::copy_",
        "aten::index_select",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void batchinfer::(anonymous namespace)::push_kernel<__nv_bfloat16, 1, 2>(batchinfer::ReduceNorm, int, int)",
        "void batchinfer::(anonymous namespace)::split_kernel<__nv_bfloat16, 1, 2>(batchinfer::ReduceNorm, int, int, int)",
        "ncclSymkDevKernel_AllReduce_AGxLL_R_sum_bf16(ncclSymkDevWorkArgs4K)",
        "c10d::allreduce_",
    ],
    "other": ["void some::kernel<int>(int)", "aten::view", "aten::empty"],
}


@pytest.mark.parametrize(("expected", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_category_of_real_names(expected: str, name: str) -> None:
    assert category(name) == expected


def test_every_category_is_in_the_table_and_tried() -> None:
    assert sorted(CATEGORY_NAMES) == sorted(NAMES)


def test_union_and_gaps() -> None:
    intervals = [(5.0, 7.0), (1.0, 2.0), (6.0, 9.0), (2.0, 3.0), (4.0, 4.0)]
    assert union(intervals) == [(1.0, 3.0), (5.0, 9.0)]
    assert gaps(intervals, (0.0, 8.0)) == [(0.0, 1.0), (3.0, 5.0)]
    assert gaps(intervals, (2.5, 10.0)) == [(3.0, 5.0), (9.0, 10.0)]
    assert gaps([], (0.0, 1.0)) == [(0.0, 1.0)] and gaps([(0.0, 1.0)], (0.0, 1.0)) == []


def test_a_dependent_launch_only_waits_while_the_kernel_before_it_runs() -> None:
    events = [Event("a", 0, 10, 7), Event("b", 8, 7, 7), Event("c", 9, 1, 7), Event("d", 20, 5, 7)]
    assert device_times(events, (0, 30)) == [10, 5, 0, 5]


def test_streams_share_what_they_do_at_once() -> None:
    events = [Event("a", 0, 10, 1), Event("b", 4, 10, 2), Event("c", 6, 2, 3)]
    assert device_times(events, (0, 20)) == pytest.approx([4 + 1 + 2 / 3 + 1, 1 + 2 / 3 + 1 + 4, 2 / 3])


def test_events_are_cut_to_the_window() -> None:
    events = [Event("a", 0, 10, 1), Event("b", 12, 10, 1), Event("c", 30, 1, 1)]
    assert device_times(events, (5, 15)) == [5, 3, 0]
    assert host_times(events, (5, 15)) == [5, 3, 0]


@pytest.mark.parametrize("seed", range(20))
def test_own_times_add_up_to_the_union(seed: int) -> None:
    rng = random.Random(seed)
    events = [Event("k", rng.randrange(100), rng.randrange(12), rng.randrange(3)) for _ in range(rng.randrange(40))]
    window = (10.0, 90.0)
    free = sum(stop - start for start, stop in gaps([(e.start, e.stop) for e in events], window))
    times = device_times(events, window)
    assert sum(times) + free == pytest.approx(80)
    assert all(-1e-9 <= us <= event.duration + 1e-9 for us, event in zip(times, events, strict=True))


def test_nested_operations_count_without_what_they_call() -> None:
    events = [Event("inner", 2, 3, 1), Event("outer", 0, 10, 1), Event("innermost", 3, 1, 1), Event("next", 10, 2, 1)]
    assert host_times(events, (0, 20)) == [2, 7, 1, 2]
    assert host_times([*events, Event("elsewhere", 0, 10, 2)], (0, 20)) == [2, 7, 1, 2, 10]


def test_a_window_adds_up() -> None:
    gemm, copy = NAMES["GEMM"][0], NAMES["copies"][0]
    kernels = [Event(gemm, 0, 20, 7), Event(gemm, 25, 10, 7), Event(copy, 33, 10, 7), Event("later", 200, 1, 7)]
    ranges = [Event("forward", 1, 5, 1), Event(WINDOW, 10, 100, 1), Event("forward", 30, 6, 1), Event("wait", 36, 4, 1)]
    found = break_down(Trace(kernels, [Event("aten::mm", 12, 5, 1)], ranges))
    parts = {part.name: (part.us, part.calls) for part in found.categories if part.calls}
    assert parts == {"GEMM": (20, 2), "copies": (8, 1), IDLE: (100 - 28, 2)}
    assert sum(part.us for part in found.categories) == found.window_us == 100
    assert [(part.name, part.mean_us) for part in found.names] == [(gemm, 10), (copy, 8)]
    assert found.idle == 0.72 and found.phases["forward"] == 6 and found.phases["wait"] == 4 and found.phases["build"] == 0


def test_without_a_device_operations_of_the_stepping_thread_count() -> None:
    ops = [Event("aten::linear", 10, 30, 1), Event("aten::mm", 15, 20, 1), Event("aten::mm", 10, 90, 2)]
    found = break_down(Trace([], ops, [Event(WINDOW, 0, 100, 1)]))
    assert {part.name: part.us for part in found.categories if part.calls} == {"GEMM": 30, IDLE: 70}
    assert [(part.name, part.us) for part in found.names] == [("aten::mm", 20), ("aten::linear", 10)]


def raw(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 3, "ts": ts, "dur": dur, "args": args}


def test_reads_what_the_profiler_writes(tmp_path: Path) -> None:
    """Ranges are repeated for the device, and the profiler adds a span of its own, with a text for a thread."""
    events = [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "ts": 0, "args": {"name": "python"}},
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler", "ts": 0, "dur": 9},
        {"ph": "s", "id": 1, "pid": 0, "tid": 3, "ts": 2, "cat": "ac2g", "name": "ac2g"},
        raw("user_annotation", WINDOW, 1.5, 8),
        raw("gpu_user_annotation", WINDOW, 2, 8, stream=7),
        raw("cpu_op", "aten::mm", 2, 1),
        raw("cuda_runtime", "cudaLaunchKernel", 2.1, 0.5),
        raw("kernel", "nvjet", 3, 4, stream=7, device=0),
        raw("gpu_memcpy", "Memcpy DtoH", 7, 1, stream=9),
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    trace = read_trace(path)
    assert trace.kernels == [Event("nvjet", 3, 4, 7), Event("Memcpy DtoH", 7, 1, 9)]
    assert trace.ops == [Event("aten::mm", 2, 1, 3)] and trace.window == Event(WINDOW, 1.5, 8, 3)
