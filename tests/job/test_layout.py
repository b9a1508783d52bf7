"""Which layout of a node is chosen: the best predicted for the input, the only one that fits, or the one that was asked for."""

from __future__ import annotations

import pytest

from batchinfer.compose import compose
from batchinfer.config import Config, ConfigError
from batchinfer.job.layout import Layout, choose, layouts, standard_demand
from batchinfer.model.config import load_shape
from batchinfer.prediction import Demand
from batchinfer.roofline import Work

LONG = Demand(Work(0, (3000,) * 64, (1000,) * 64), 100_000)
ONE = Demand(Work(0, (128,), (128,)), 1)


def asked(model: str, hw: str, *overrides: str) -> Config:
    return compose([f"model={model}", f"hw={hw}", *overrides], planning=True)


def weighed(config: Config, demand: Demand | None = None) -> tuple[Layout, list[Layout]]:
    found = layouts(config, load_shape(config.model), demand)
    return choose(config.hw, found), found


@pytest.mark.parametrize(
    ("model", "hw", "ranks"),
    [
        ("llama7b", "rtx4090x2", [1, 2]),
        ("llama13b", "rtx4090x2", [2]),
        ("llama13b", "a100x4", [1, 2, 4]),
        ("llama3_70b", "a100x4", [4]),
        ("llama3_70b", "h200x2", [2]),
        ("llama70b", "a100x4", [2, 4]),
        ("llama70b", "h200x8", [2, 4, 8]),
        ("llama70b", "rtx4090x2", []),
        ("llama3_70b", "rtx4090x2", []),
        ("qwen2_7b", "a100x8", [1, 2, 4]),  # 28 heads
    ],
)
def test_layouts_that_fit_and_divide_the_model(model: str, hw: str, ranks: list[int]) -> None:
    _, found = weighed(asked(model, hw))
    assert [layout.ranks for layout in found if layout.memory.fits] == ranks
    assert all((layout.prediction is not None) == layout.memory.fits for layout in found)
    assert all(layout.replicas * layout.ranks == layout.hw.gpus_per_node for layout in found)


@pytest.mark.parametrize("demand", [None, LONG, ONE])
@pytest.mark.parametrize(("model", "hw"), [("llama7b", "h200x8"), ("llama13b", "a100x4"), ("llama70b", "h200x8")])
def test_auto_is_the_highest_throughput_predicted(model: str, hw: str, demand: Demand | None) -> None:
    chosen, found = weighed(asked(model, hw), demand)
    rates = [layout.prediction.tokens_out_s for layout in found if layout.prediction]
    assert chosen.prediction is not None and chosen.prediction.tokens_out_s == max(rates)
    assert chosen == weighed(asked(model, hw), demand)[0]


def test_the_input_decides() -> None:
    """Many rows keep every GPU busy alone; one row is fastest with all of them together."""
    many, one = (weighed(asked("llama3_8b", "h200x8", "model.max_model_len=8192"), demand)[0] for demand in (LONG, ONE))
    assert (many.ranks, one.ranks) == (1, 8)


def test_what_is_asked_for_is_taken_and_the_others_are_still_weighed() -> None:
    chosen, found = weighed(asked("llama7b", "a100x4", "hw.tensor_parallel=4"))
    assert chosen.ranks == 4 and [layout.ranks for layout in found] == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"hw.tensor_parallel=8 does not divide the model's 28 attention heads"):
        weighed(asked("qwen2_7b", "a100x8", "hw.tensor_parallel=8"))


def test_the_nearest_to_fitting_stands_for_what_does_not_fit() -> None:
    chosen, _ = weighed(asked("llama70b", "rtx4090x2"))
    assert chosen.ranks == 2 and not chosen.memory.fits and chosen.prediction is None


def test_without_a_prediction_the_fewest_ranks_that_fit() -> None:
    assert weighed(asked("llama13b", "a100x4", "engine=eager"))[0].ranks == 1
    assert weighed(asked("llama70b", "a100x4", "engine=eager"))[0].ranks == 2
    assert weighed(asked("llama13b", "a100x4"), Demand(Work(0, (), ()), 0))[0].ranks == 1  # an input without rows


def test_the_standard_work_is_always_the_same_and_fits_the_model() -> None:
    work = standard_demand(4, 300).sample
    assert work == standard_demand(4, 300).sample and standard_demand(4, 300).sequences == 4096
    assert max(p + c for p, c in zip(work.prompts, work.completions, strict=True)) <= 300
    longer = standard_demand(1, 4096).sample
    assert (min(longer.prompts), max(longer.prompts)) == (64, 1024)
    assert (min(longer.completions), max(longer.completions)) == (64, 512)
