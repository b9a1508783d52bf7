"""Whether counts are what probabilities lead to: Pearson's chi-square test."""

from __future__ import annotations

import torch


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-square test; rare cells, below 5 expected draws, count as one. What cannot come must not have come."""
    counts, wanted = counts.double(), probabilities * counts.sum()
    if counts[wanted == 0].any():
        return 0.0
    rare = wanted < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((wanted[~rare], wanted[rare].sum()[None]))
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    if len(wanted) == 1:
        return 1.0
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64), statistic / 2))
