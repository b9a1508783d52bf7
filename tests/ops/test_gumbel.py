"""The kernels' float32 formula of Gumbel noise (`gumbel_noise` in csrc/sampling_noise.cuh), in numpy, against float64."""

from __future__ import annotations

import numpy as np

LAST = 2**32 - 1
MOST, LEAST, MARGIN = 22.88, -3.14, 1e-4  # what the kernels take for bounds


def narrow(words: np.ndarray) -> np.ndarray:
    """The kernel's steps, each rounded to float32. fma(word, 2^-32, 2^-33) rounds once, as the sum in float64 here does."""
    unit = 2.0**-32
    u = (words.astype(np.float32).astype(np.float64) * unit + unit / 2).astype(np.float32)
    rest = ((LAST - words).astype(np.float32).astype(np.float64) * unit + unit / 2).astype(np.float32)
    exponential = np.where(words < 2**31, -np.log(u), -np.log1p(-np.minimum(rest, np.float32(0.5))))
    return -np.log(exponential.astype(np.float32))


def exact(words: np.ndarray) -> np.ndarray:
    """In long double, or u near 1 would lose what 1 - u has."""
    rest = (LAST - words).astype(np.longdouble) + np.longdouble(0.5)
    return -np.log(-np.log1p(-rest / 2**32))


def some_words() -> np.ndarray:
    ends = np.arange(200_000, dtype=np.int64)
    powers = (2 ** np.arange(33, dtype=np.int64)[:, None] + np.arange(-300, 300)).flatten()
    random = np.random.default_rng(0).integers(0, 2**32, 500_000)
    words = np.concatenate((ends, LAST - ends, powers, LAST - powers, random))
    return words[(words >= 0) & (words <= LAST)]


def test_noise_in_float32_is_that_of_float64() -> None:
    words = some_words()
    wanted = exact(words)
    reference = -np.log(-np.log((words + 0.5) / 2**32))
    assert np.max(np.abs(reference - wanted) / np.maximum(1, np.abs(wanted))) < 1e-6  # its own u is rounded near 1
    assert np.max(np.abs(narrow(words) - wanted) / np.maximum(1, np.abs(wanted))) < 5e-7
    assert wanted.min() > LEAST
    assert wanted.max() < MOST


def test_the_cheap_bound_is_one() -> None:
    words = some_words()
    with np.errstate(divide="ignore"):
        bound = -np.log((LAST - words).astype(np.float64) / 2**32)
    assert np.all(bound >= exact(words) - MARGIN / 10)
