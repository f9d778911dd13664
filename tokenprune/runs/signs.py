"""The test of signs: how often a sum comes out so far from 0 if each part's sign is a fair coin.

Fisher, 1935. All ways in which the coins may fall are counted, not some of them drawn: p has no
floor, so that a difference beyond doubt stays one among thousands of comparisons.

Shape suffixes: N parts, U sizes that occur, F frequencies.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_FINEST = 100  # parts of one: scores are tenths, thirds of them over three seeds, and the like
_LONGEST = 2**17  # steps; a finer lattice is not followed
_STEPS = 2**14  # along the sums, where scores lie on no lattice
_REACH = 24  # standard deviations that those steps cover; beyond, no 10^-30 of the ways are


def sign_p(part_N: NDArray[np.float64]) -> float:
    """Two-sided p of a sum, were the sign of each part a fair coin; any order of the parts.

    Exact where the parts are multiples of one fraction. Others are rounded to the 683rd of the
    sum's standard deviation, their sum to that as well.

    The sum of coins times sizes has the characteristic function prod cos(t size), whose Fourier
    transform is its distribution. In its tails that would be lost among rounding errors; so the
    coins are loaded until what is seen is what they give on average (Esscher, 1932), and the
    chances weighed back.
    """
    size_U, count_U, seen = _on_a_lattice(part_N)
    if seen == 0:
        return 1.0
    tilt = _tilt(size_U, count_U, seen)
    num_steps = _num_steps(size_U, count_U)
    angle_F = 2 * np.pi / num_steps * np.arange(num_steps // 2 + 1)
    transform_F = np.exp(-1j * (angle_F * seen % (2 * np.pi)))
    for size, count, lean in zip(size_U, count_U, np.tanh(tilt * size_U), strict=True):
        one_F = np.cos(size * angle_F) + 1j * lean * np.sin(size * angle_F)
        transform_F *= one_F if count == 1 else one_F**count
    # Chances, with loaded coins, of what is seen and of each step beyond.
    beyond = np.fft.irfft(transform_F.conj(), num_steps)[: num_steps // 2].clip(0)
    weight = float(beyond @ np.exp(-tilt * np.arange(len(beyond))))
    cosh_U = np.logaddexp(tilt * size_U, -tilt * size_U) - np.log(2)
    return min(1.0, 2 * weight * float(np.exp(count_U @ cosh_U - tilt * seen)))


def _on_a_lattice(
    part_N: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Sizes above 0 in steps, how often each occurs, and how many steps the sum is from 0."""
    part_N = part_N[np.argsort(np.abs(part_N), kind="stable")]
    values = np.unique(np.abs(part_N))
    for parts in range(1, _FINEST + 1):
        if np.abs(values * parts - np.rint(values * parts)).max(initial=0) < 1e-8:
            steps_N = np.rint(part_N * parts)
            size_U, count_U = np.unique(np.abs(steps_N[steps_N != 0]), return_counts=True)
            if _num_steps(size_U, count_U) <= _LONGEST:
                break
    else:
        step = _REACH / _STEPS * float(np.sqrt((part_N**2).sum()))
        # What rounding does to one part is made up for by the next.
        steps_N = np.diff(np.rint(np.cumsum(part_N / step)), prepend=0)
        size_U, count_U = np.unique(np.abs(steps_N[steps_N != 0]), return_counts=True)
    return size_U.astype(np.int64), count_U, abs(int(steps_N.sum()))


def _num_steps(size_U: NDArray[np.number], count_U: NDArray[np.int64]) -> int:
    """As many as keep ends of the distribution apart that a transform lays over each other."""
    whole = 4 * float(count_U @ size_U) + 2
    most = min(whole, _REACH * float(np.sqrt(count_U @ size_U**2)) + 2)
    return 1 << math.ceil(math.log2(most))


def _tilt(size_U: NDArray[np.int64], count_U: NDArray[np.int64], seen: int) -> float:
    """The load of the coins at which their sum is, on average, what is seen."""
    low, high = 0.0, 20.0  # at which not one coin of 10^17 falls on the other side
    for _ in range(60):
        middle = (low + high) / 2
        short = float(count_U @ (size_U * np.tanh(middle * size_U))) < seen
        low, high = (middle, high) if short else (low, middle)
    return low
