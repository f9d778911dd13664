"""Pure functions on tensors, against plain Python."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.tensors import (
    ascending,
    attention_rows,
    best,
    causal,
    find,
    mark,
    mixture,
    number_grids,
    snap,
    split_budget,
    take,
    top_k,
)

rows = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=4)


def ragged(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, lists))
    values = torch.zeros(len(lists), width)
    valid = torch.zeros(len(lists), width, dtype=torch.bool)
    for i, row in enumerate(lists):
        values[i, : len(row)] = torch.tensor(row, dtype=torch.float32)
        valid[i, : len(row)] = True
    return values, valid


@given(lists=rows, keep=st.lists(st.integers(0, 12), min_size=4, max_size=4))
def test_top_k(lists: list[list[int]], keep: list[int]) -> None:
    values, valid = ragged(lists)
    mask = top_k(values, valid, torch.tensor(keep[: len(lists)]))
    for row, own, budget in zip(mask, lists, keep, strict=False):
        best = sorted(range(len(own)), key=lambda i: (-own[i], i))[:budget]
        assert row.nonzero()[:, 0].tolist() == sorted(best)


def test_top_k_takes_infinities_and_nan() -> None:
    values = torch.tensor([[float("nan"), -torch.inf, 1.0, torch.inf, 0.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert top_k(values, valid, torch.tensor([2])).tolist() == [[False, False, True, True, False]]
    assert top_k(values, valid, torch.tensor([4])).tolist() == [[True] * 4 + [False]]


@given(lists=rows, keep=st.integers(1, 12))
def test_the_best_are_those_that_top_k_marks(lists: list[list[int]], keep: int) -> None:
    """Of rows that keep as many, in rows of which some tokens do not exist."""
    values, valid = ragged(lists)
    keep = min(keep, *map(len, lists))
    marked = top_k(values, valid, torch.full((len(lists),), keep))
    expected = [row.nonzero()[:, 0].tolist() for row in marked]
    assert best(values, valid, keep).tolist() == expected
    if valid.all():
        assert best(values, None, keep).tolist() == expected


@given(lists=rows)
def test_ascending(lists: list[list[int]]) -> None:
    values, valid = ragged(lists)
    mask = (values > 0) & valid
    length = int(mask.sum(1).max())
    index = ascending(mask, length)
    assert index.shape == (len(lists), length)
    for row, marks in zip(index, mask, strict=True):
        expected = marks.nonzero()[:, 0].tolist()
        assert row[: len(expected)].tolist() == expected


def test_take_along_any_dimension() -> None:
    torch.manual_seed(0)
    values = torch.randn(1, 3, 5, 7)
    index = torch.tensor([[4, 0], [1, 1]])
    by_rows = take(values.expand(2, 3, 5, 7), index, dim=2)
    for row in range(2):
        assert torch.equal(by_rows[row], values[0][:, index[row]])
    assert torch.equal(take(values, index, dim=2), by_rows)  # a batch of one is expanded
    tripled = torch.randn(3, 2, 5, 4)  # leading dimensions before the batch, as in M-RoPE
    got = take(tripled, index, batch=1, dim=2)
    for row in range(2):
        assert torch.equal(got[:, row], tripled[:, row][:, index[row]])
    assert torch.equal(take(values, index[:1], dim=2), values[:, :, index[0]])


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    share=st.floats(0, 1.2),
)
def test_split_budget(sizes: list[int], share: float) -> None:
    budget = int(sum(sizes) * share)
    (split,) = split_budget(torch.tensor([budget]), torch.tensor([sizes])).tolist()
    total = sum(sizes)
    assert sum(split) == min(budget, total)
    for part, size in zip(split, sizes, strict=True):
        assert part <= size
        if total:
            exact = min(budget, total) * size / total
            assert int(exact) <= part <= int(exact) + 1


def test_split_budget_gives_the_largest_remainder_first() -> None:
    split = split_budget(torch.tensor([5, 3]), torch.tensor([[10, 10, 4], [2, 2, 2]]))
    assert split.tolist() == [[2, 2, 1], [1, 1, 1]]
    assert split_budget(torch.tensor([2]), torch.tensor([[1, 1, 1]])).tolist() == [[1, 1, 0]]


def test_of_picks_the_first_count() -> None:
    picks = [torch.tensor([[2], [1]]), torch.tensor([[0], [1]]), torch.tensor([[1], [0]])]
    valid = torch.tensor([[True, True, True], [True, False, False]])
    assert mark(picks, torch.tensor([2, 3]), valid).tolist() == [
        [True, False, True],
        [True, False, False],
    ]
    assert not mark([], torch.tensor([2, 3]), valid).any()


def test_each_token_goes_into_one_mixture() -> None:
    weights = mixture(torch.tensor([[1, 0, 1, 0]]), torch.tensor([[0.5, 1.0, 0.5, 0.0]]), 2)
    assert weights.tolist() == [[[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]]]
    assert mixture(torch.tensor([[0, 0]]), torch.ones(1, 2), 0).shape == (1, 0, 2)


def test_grids_are_numbered_in_order() -> None:
    cells = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0), (1, 0, 0, 0), (2, -1, -1, -1)]
    assert number_grids(torch.tensor([cells])).tolist() == [[0, 0, 1, 2, 3]]
    unknown = torch.tensor([[(0, -1, -1, -1), (1, -1, -1, -1)]])
    assert number_grids(unknown).tolist() == [[0, 0]]


def test_attention_rows_equal_full_attention() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    full = queries @ keys.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    order = torch.arange(6)
    full = full.masked_fill(order > order[:, None], -torch.inf).softmax(-1)
    asked = torch.tensor([[5, 2], [3, 3]])
    allowed = causal(asked, 6, 0)
    got = attention_rows(take(queries, asked, dim=2), keys, allowed, 0.3)
    torch.testing.assert_close(got, take(full, asked, dim=2))
    nothing = attention_rows(queries, keys, torch.zeros(2, 1, 6, 6, dtype=torch.bool), 0.3)
    assert not nothing.any()


def test_of_many_equal_scores_the_first_stay() -> None:
    """A sort that is not stable goes unnoticed in short rows."""
    values = torch.zeros(2, 5000)
    values[1] = torch.arange(5000) % 2
    first, odd = top_k(values, None, torch.tensor([7, 7]))
    assert first.nonzero()[:, 0].tolist() == list(range(7))
    assert odd.nonzero()[:, 0].tolist() == list(range(1, 14, 2))
    marked = values.bool()
    assert ascending(marked, 2500)[1].tolist() == list(range(1, 5000, 2))


def test_a_softcap_squeezes_the_logits_before_the_mask() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    order = torch.arange(4)
    allowed = causal(order[None], 4, 0)
    logits = ((queries @ keys.transpose(2, 3)) / 0.5).tanh() * 0.5
    expected = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention_rows(queries, keys, allowed, 1.0, 0.5), expected)
    everything = attention_rows(queries, keys, None, 1.0, 0.5)
    torch.testing.assert_close(everything, logits.softmax(-1))


@given(lists=rows, wanted=st.lists(st.integers(-5, 5), min_size=1, max_size=6))
def test_find(lists: list[list[int]], wanted: list[int]) -> None:
    width = min(map(len, lists))
    keys = torch.tensor([row[:width] for row in lists])
    index, there = find(keys, torch.tensor([wanted] * len(lists)))
    for row, own in enumerate(keys.tolist()):
        assert there[row].tolist() == [number in own for number in wanted]
        for place, number in zip(index[row].tolist(), wanted, strict=True):
            assert 0 <= place < width
            assert number not in own or place == own.index(number)


@given(lists=rows)
def test_snap(lists: list[list[int]]) -> None:
    """What is a millionth apart is as the least of it; the rest stays, and what is no number."""
    width = min(map(len, lists))
    own = torch.Generator().manual_seed(width)
    numbers = torch.tensor([row[:width] for row in lists]).double()
    noisy = numbers + 1e-9 * torch.rand(numbers.shape, generator=own)
    noisy = noisy.masked_fill(numbers == 3, torch.nan).masked_fill(numbers == -3, -torch.inf)
    for row, snapped in zip(noisy, snap(noisy, 1e-6), strict=True):
        for value, found in zip(row, snapped, strict=True):
            alike = row[(row - value).abs() < 0.5]
            torch.testing.assert_close(
                found, alike.min() if len(alike) else value, rtol=0, atol=0, equal_nan=True
            )
