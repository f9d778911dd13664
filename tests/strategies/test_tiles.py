"""Methods that choose tile by tile, against their rules, written again with loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from made_tiles import Row, budgets, cases, ranked, row_of, signals, view_of
from torch import Tensor

import tokenprune as tp
from tokenprune.strategy import Need, TileShape

Vectors = list[list[float]]
#: What a tile keeps of its tokens under its budget.
Tile = Callable[[list[int], int], list[int]]


# ------------------------------------------------------------------------- the methods, once again


def tile_by_tile(row: Row, keep: int, choose: Tile) -> list[int]:
    parts, rest = budgets(row, keep)
    chosen = row[1][:rest]
    for tile, count in zip(row[0], parts, strict=True):
        chosen = chosen + choose(tile, count)
    return sorted(chosen)


def hiprune(
    row: Row,
    middle: list[float],
    late: list[float],
    places: list[list[int]],
    keep: int,
    part: float,
) -> list[int]:
    def beside(a: int, b: int) -> bool:
        known = min(places[a]) >= 0 and min(places[b]) >= 0
        apart = abs(places[a][2] - places[b][2]) + abs(places[a][3] - places[b][3])
        return known and apart == 1

    def choose(tile: list[int], count: int) -> list[int]:
        anchors = ranked(tile, middle)[: round(count * (part / 5))]
        around = [
            token
            for token in tile
            if token not in anchors and any(beside(token, anchor) for anchor in anchors)
        ]
        others = [token for token in tile if token not in anchors and token not in around]
        order = ranked(anchors, late) + ranked(around, late) + ranked(others, late)
        return order[:count]

    return tile_by_tile(row, keep, choose)


def holov_shares(tile: list[int], scores: list[float], parts: int) -> tuple[Vectors, list[float]]:
    """Stretches of a tile, and the share of the budget of each."""
    stretches, start = [], 0
    for number in range(parts):
        size = len(tile) // parts + (number < len(tile) % parts)
        if size:
            stretches.append(tile[start : start + size])
        start += size
    means = [sum(scores[token] for token in own) / len(own) for own in stretches]
    return stretches, [mean / max(sum(means), 1e-9) for mean in means]


def holov(row: Row, scores: list[float], keep: int, parts: int, exact: bool) -> list[int]:
    def choose(tile: list[int], count: int) -> list[int]:
        if count >= len(tile):
            return tile
        stretches, shares = holov_shares(tile, scores, parts)
        gets = [math.floor(share * count) for share in shares]
        for number in ranked(list(range(len(gets))), shares)[: count - sum(gets)]:
            gets[number] += 1
        chosen = []
        for own, number in zip(stretches, gets, strict=True):
            chosen += ranked(own, scores)[:number]
        if exact:
            others = [token for token in tile if token not in chosen]
            chosen += ranked(others, scores)[: count - len(chosen)]
        return chosen

    return tile_by_tile(row, keep, choose)


def cosine(a: list[float], b: list[float]) -> float:
    lengths = sum(x * x for x in a) ** 0.5, sum(x * x for x in b) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1])


class Greedy:
    """Greedily what adds most to the best of each row.

    Attributes:
        near: Whether two gains were alike but for rounding, so that either could have been picked.
    """

    near = False

    def __call__(self, rows: Vectors, worth: list[float], count: int) -> list[int]:
        best, picked = [0.0] * len(rows), list[int]()
        for _ in range(count):
            gains = {
                j: own * sum(max(0.0, row[j] - b) for row, b in zip(rows, best, strict=True))
                for j, own in enumerate(worth)
                if j not in picked
            }
            first, *others = sorted(gains, key=lambda j: (-gains[j], j))
            if others and gains[first] and gains[others[0]] > gains[first] * (1 - 1e-6):
                self.near = True
            picked.append(first)
            best = [max(row[first], b) for row, b in zip(rows, best, strict=True)]
        return picked


def scope(
    row: Row, scores: list[float], states: Vectors, keep: int, power: float, greedy: Greedy
) -> list[int]:
    def choose(tile: list[int], count: int) -> list[int]:
        alike = [[cosine(states[a], states[b]) for b in tile] for a in tile]
        worth = [scores[token] ** power for token in tile]
        return [tile[place] for place in greedy(alike, worth, count)]

    return tile_by_tile(row, keep, choose)


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def mmtok(
    row: Row,
    words: Vectors,
    projected: Vectors,
    states: Vectors,
    keep: int,
    greedy: Greedy,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    weight: float = 0.5,
) -> list[int]:
    def choose(tile: list[int], count: int) -> list[int]:
        rows = []
        for word in words:
            like = softmax([cosine(word, projected[j]) / text_temperature for j in tile])
            rows.append([own / len(words) for own in like])
        for i in tile:
            like = softmax([cosine(states[i], states[j]) / vision_temperature for j in tile])
            rows.append([own * weight / len(tile) for own in like])
        return [tile[place] for place in greedy(rows, [1.0] * len(tile), count)]

    return tile_by_tile(row, keep, choose)


# ------------------------------------------------------------------------------ on views made up


def spots(rows: list[Row], width: int, seed: int) -> Tensor:
    """Places in mosaics: tiles side by side, newlines after the last; some tokens have none."""
    own = torch.Generator().manual_seed(seed)
    places = torch.full((len(rows), width, 4), -1)
    for number, (tiles, newlines) in enumerate(rows):
        left = 0
        for tile in tiles:
            columns = int(torch.randint(1, 8, (), generator=own))
            cells = torch.arange(len(tile))
            if torch.rand((), generator=own) < 0.5:  # not in the order of their numbers
                cells = torch.randperm(len(tile), generator=own)
            places[number, tile, 0:2] = torch.tensor([0, 1])
            places[number, tile, 2] = cells // columns
            places[number, tile, 3] = left + cells % columns
            left += columns
        for line, token in enumerate(newlines):
            places[number, token] = torch.tensor([0, 1, line, left])
    places[torch.rand(len(rows), width, generator=own) < 0.1] = -1
    return places


def most_of(rows: list[Row], keep: list[int]) -> int:
    counts = [sum(map(len, tiles)) + len(newlines) for tiles, newlines in rows]
    return max(map(min, counts, keep))


def longer(rows: list[Row], spare: int) -> dict[Need, Any]:
    """That tiles had more tokens before an earlier cut."""
    tiles = [tile for own, _ in rows for tile in own]
    return {TileShape(): (max(len(own) for own, _ in rows), max(map(len, tiles)) + spare)}


def picks(strategy: tp.PruningStrategy, view: tp.TokenView, keep: list[int]) -> list[list[int]]:
    selection = strategy.select(view, torch.tensor(keep))
    assert selection.weights is None
    counts = view.valid.sum(1).tolist()
    kept = selection.kept.sum(1).tolist()
    assert not strategy.keeps_exactly or kept == list(map(min, keep, counts))
    return [row.nonzero()[:, 0].tolist() for row in selection.kept]


@pytest.mark.matrix
@given(
    case=cases(),
    anchors=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    layers=st.sampled_from([(-2, 8), (5, 1), (3, 3)]),
    spare=st.integers(0, 2),
)
def test_hiprune(case: Any, anchors: float, layers: tuple[int, int], spare: int) -> None:
    rows, width, keep, seed = case
    late, middle = layers
    attention = {
        layer: signals(rows, width, seed + layer + 2)[0].float() for layer in sorted(set(layers))
    }
    states, places = torch.zeros(len(rows), width, 1), spots(rows, width, seed)
    most, more = most_of(rows, keep), longer(rows, spare)
    seen = view_of(rows, attention, states, most, places=places, more=more)
    strategy = tp.build_strategy("hiprune", layer=late, middle=middle, anchors=anchors)
    kept = picks(strategy, seen, keep)
    for number, row in enumerate(rows):
        scores = [attention[layer][number].mean(0).tolist() for layer in (middle, late)]
        own = places[number].tolist()
        assert kept[number] == hiprune(row, *scores, own, keep[number], anchors)


@pytest.mark.matrix
@given(
    case=cases(),
    parts=st.sampled_from([1, 3, 16, 50]),
    exact=st.booleans(),
    peaked=st.booleans(),
    spare=st.integers(0, 2),
)
def test_holov(case: Any, parts: int, exact: bool, peaked: bool, spare: int) -> None:
    rows, width, keep, seed = case
    attention, states = signals(rows, width, seed)
    attention = (attention ** (9 if peaked else 1)).float()
    scores = [attention[number].mean(0).tolist() for number in range(len(rows))]
    for number, row in enumerate(rows):
        for tile, count in zip(row[0], budgets(row, keep[number])[0], strict=True):
            shares = holov_shares(tile, scores[number], parts)[1]
            if len(shares) > 1 and 0 < count < len(tile):
                assume(all(abs(s * count - round(s * count)) > 1e-4 for s in shares))
    strategy = tp.build_strategy("holov", parts=parts, exact_budget=exact)
    assert strategy.keeps_exactly == exact
    seen = view_of(rows, attention, states, most_of(rows, keep), more=longer(rows, spare))
    kept = picks(strategy, seen, keep)
    for number, row in enumerate(rows):
        assert kept[number] == holov(row, scores[number], keep[number], parts, exact)


@pytest.mark.matrix
@given(
    case=cases(),
    features=st.sampled_from(["tower", "projected"]),
    power=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    spare=st.integers(0, 2),
)
def test_scope(case: Any, features: str, power: float, spare: int) -> None:
    rows, width, keep, seed = case
    attention, states = signals(rows, width, seed)
    projected = signals(rows, width, seed + 1)[1]
    more = longer(rows, spare) | {tp.Projected(): projected}
    seen = view_of(rows, attention.float(), states, most_of(rows, keep), more=more)  # in float64
    strategy = tp.build_strategy("scope", features=features, power=power)
    kept = picks(strategy, seen, keep)
    vectors = states if features == "tower" else projected
    for number, row in enumerate(rows):
        scores, greedy = attention[number].float().sum(0).tolist(), Greedy()
        expected = scope(row, scores, vectors[number].tolist(), keep[number], power, greedy)
        assume(kept[number] == expected or not greedy.near)
        assert kept[number] == expected


def words_of(count: int, seed: int) -> tp.TextView:
    """Up to five words of each row, of which some, none or all follow the image."""
    own = torch.Generator().manual_seed(seed)
    number, after = torch.randint(0, 6, (2, count, 1), generator=own)
    valid = torch.arange(5) < number
    return tp.TextView(
        embeddings=torch.randn(count, 5, 5, generator=own, dtype=torch.float64),
        valid=valid,
        follows=valid & (torch.arange(5) >= after),
        positions=torch.arange(5).expand(count, -1),
    )


@pytest.mark.matrix
@given(
    case=cases(),
    temperatures=st.sampled_from([(0.02, 0.2), (0.3, 1.0)]),
    weight=st.sampled_from([0.0, 0.5, 3.0]),
    spare=st.integers(0, 2),
)
def test_mmtok(case: Any, temperatures: tuple[float, float], weight: float, spare: int) -> None:
    rows, width, keep, seed = case
    states, projected = (signals(rows, width, own)[1] for own in (seed, seed + 1))
    text = words_of(len(rows), seed)
    more = longer(rows, spare) | {tp.Projected(): projected, tp.Text(): text}
    seen = view_of(rows, {}, states, most_of(rows, keep), more=more)  # in float64
    text_temperature, vision_temperature = temperatures
    fields = {
        "text_temperature": text_temperature,
        "vision_temperature": vision_temperature,
        "weight": weight,
    }
    kept = picks(tp.build_strategy("mmtok", **fields), seen, keep)
    for number, row in enumerate(rows):
        asks = text.follows[number] if text.follows[number].any() else text.valid[number]
        words, greedy = text.embeddings[number][asks].tolist(), Greedy()
        vectors = projected[number].tolist(), states[number].tolist()
        expected = mmtok(row, words, *vectors, keep[number], greedy, **fields)
        assume(kept[number] == expected or not greedy.near)
        assert kept[number] == expected


# ---------------------------------------------------------------------------------- worked by hand


def one_tile(attention: list[float] | dict[int, list[float]], states: Vectors, **more: Any) -> Any:
    """A view of one tile, whose attention two heads pay, one three times what the other does."""

    def heads(scores: list[float]) -> Tensor:
        return torch.tensor(scores) * torch.tensor([[0.5], [1.5]])

    count = len(states)
    known = (
        {layer: heads(own)[None] for layer, own in attention.items()}
        if isinstance(attention, dict)
        else heads(attention)[None]
    )
    rows = [row_of([count], 0, list(range(count)))]
    return view_of(rows, known, torch.tensor(states)[None], count, **more)


def test_hiprune_by_hand() -> None:
    """Of 3 x 3 tokens the anchor is in a corner, beside 1 and 3; 2 is in no row beside 3."""
    middle = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    late = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    places = torch.tensor([[[0, 0, r, c] for r in range(3) for c in range(3)]])
    seen = one_tile({8: middle, -2: late}, [[0.0]] * 9, places=places)
    strategy = tp.build_strategy("hiprune", anchors=1.0)
    assert set(strategy.needs()) == {tp.VisionRows(8, "all"), tp.VisionRows(-2, "all")}
    for keep, expected in (
        (0, []),
        (2, [7, 8]),  # round(0.4) anchors
        (3, [0, 1, 3]),  # round(0.6)
        (5, [0, 1, 3, 7, 8]),
        (8, [0, 1, 3, 4, 5, 6, 7, 8]),  # round(1.6), the last too; 2 is paid least of the others
        (9, list(range(9))),
    ):
        assert picks(strategy, seen, [keep]) == [expected]
    for part, expected in ((0.1, [4, 5, 6, 7, 8]), (0.5, [4, 5, 6, 7, 8]), (0.6, [0, 1, 3, 7, 8])):
        strategy = tp.build_strategy("hiprune", anchors=part)
        assert picks(strategy, seen, [5]) == [expected]  # round(0.1), round(0.5) and round(0.6)


def test_holov_by_hand() -> None:
    """Stretches of 3, 2 and 2 tokens, of shares 2, 8 and 1 of 11: of 4 seats 0, 2 and 0."""
    seen = one_tile([0.1, 0.2, 0.3, 0.8, 0.8, 0.0, 0.2], [[0.0]] * 7)
    # The two left over go to the second, which has no third token, and to the first.
    assert picks(tp.build_strategy("holov", parts=3), seen, [4]) == [[2, 3, 4]]
    # Tokens 1 and 6 are paid alike.
    strategy = tp.build_strategy("holov", parts=3, exact_budget=True)
    assert picks(strategy, seen, [4]) == [[1, 2, 3, 4]]
    nobody = one_tile([0.0] * 7, [[0.0]] * 7)
    assert picks(tp.build_strategy("holov", parts=3), nobody, [2]) == [[0, 3]]


def test_scope_by_hand() -> None:
    """Two tokens are equal: the more attended one covers both, and then the third comes."""
    states = [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]
    alike = {tp.Projected(): torch.ones(1, 3, 2)}
    seen = one_tile([3.0, 4.0, 2.0], states, more=alike)
    for fields, one, two in (
        ({}, [1], [1, 2]),  # gains of 6, 8 and 2; of 0 and 2
        ({"power": 0.0}, [0], [0, 2]),  # of 2, 2 and 1; of 0 and 1
        ({"features": "projected"}, [1], [0, 1]),  # of 9, 12 and 6; of 0 and 0
    ):
        strategy = tp.build_strategy("scope", **fields)
        assert [picks(strategy, seen, [keep]) for keep in (1, 2)] == [[one], [two]]
    # Gains of 2 and 1.5; of 2 and 2.25.
    seen = one_tile([1.0, 1.0, 1.5], states)
    for power, one in ((1.0, 0), (2.0, 2)):
        assert picks(tp.build_strategy("scope", power=power), seen, [1]) == [[one]]


def test_mmtok_by_hand() -> None:
    axes = torch.eye(3)
    text = tp.TextView(
        embeddings=axes[[0, 2, 1]][None],
        valid=torch.tensor([[True, True, False]]),
        follows=torch.tensor([[False, True, False]]),
        positions=torch.arange(3)[None],
    )
    nothing_follows = dataclasses.replace(text, follows=torch.zeros(1, 3, dtype=torch.bool))
    nothing = dataclasses.replace(nothing_follows, valid=nothing_follows.follows)
    states = [[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]
    for words, weight, one, two in (
        (text, 0.0, [2], [0, 2]),  # then nothing gains, and the first is picked
        (nothing_follows, 0.0, [0], [0, 2]),  # each word half, to two tokens
        # Of the tower 0.498, 0.498 and 0.003 twice, as two are equal; and 0.007, 0.007 and 0.987.
        (nothing, 0.5, [0], [0, 2]),
        (text, 0.5, [2], [0, 2]),
    ):
        more = {tp.Projected(): axes[None], tp.Text(): words}
        seen = one_tile({}, states, more=more)
        strategy = tp.build_strategy("mmtok", weight=weight)
        assert [picks(strategy, seen, [keep]) for keep in (1, 2)] == [[one], [two]]


@pytest.mark.parametrize("name", ["hiprune", "holov", "scope", "mmtok"])
def test_rows_without_tiles_keep_nothing_or_newlines(name: str) -> None:
    rows: list[Row] = [([], []), ([[1, 2], [0]], [3]), ([], [0, 1])]
    attention, states = signals(rows, 4, 0)
    text = words_of(3, 0)
    more = {tp.Projected(): states, tp.Text(): text}
    strategy = tp.build_strategy(name)
    for keep, expected in (
        ([0, 0, 0], [[], [], []]),
        ([0, 3, 1], [[], [0, 1, 2], [0]]),
        ([0, 4, 2], [[], [0, 1, 2, 3], [0, 1]]),
    ):
        seen = view_of(rows, attention.float(), states, max(keep), more=more)
        assert picks(strategy, seen, keep) == expected


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hiprune", {"anchors": 1.5}, r"HiPrune.anchors: expected a fraction in \[0, 1\]"),
        ("hiprune", {"anchors": -0.1}, r"HiPrune.anchors: expected a fraction in \[0, 1\]"),
        *(("holov", {"parts": parts}, "HoloV.parts: expected an integer >= 1")
          for parts in (0, True, 1.5)),
        ("scope", {"features": "text"}, "SCOPE.features: expected one of"),
        ("scope", {"power": -1}, "SCOPE.power: expected a number from 0 on"),
        *(("mmtok", {f"{kind}_temperature": value},
           rf"MMTok.{kind}_temperature: expected a number above 0")
          for kind in ("text", "vision") for value in (0, -0.1)),
        ("mmtok", {"weight": -0.5}, "MMTok.weight: expected a number from 0 on"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be(name: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tp.build_strategy(name, **fields)


@pytest.mark.parametrize("name", ["mmtok", "scope"])
def test_of_equal_tokens_the_first_is_picked(name: str) -> None:
    """In a batch as alone: products that ought to be equal differ in the last digit."""
    for seed in range(30):
        own = torch.Generator().manual_seed(seed)
        states = torch.randn(3, 37, 24, generator=own)
        equal = [7, 15, 23, 31, 36]
        states[:, equal] = states[:, [7]]
        attention = torch.ones(3, 2, 37) / 37
        rows = [row_of([37], 0, list(range(37)))] * 3
        text = tp.TextView(
            embeddings=torch.randn(3, 4, 24, generator=own),
            valid=torch.ones(3, 4).bool(),
            follows=torch.ones(3, 4).bool(),
            positions=torch.arange(4).expand(3, 4) + 37,
        )

        def picked(number: int | slice, rows=rows, attention=attention, states=states, text=text):
            own = slice(number, number + 1) if isinstance(number, int) else number
            more = {
                tp.Text(): tp.TextView(
                    *(getattr(text, f.name)[own] for f in dataclasses.fields(text))
                ),
                tp.Projected(): states[own],
            }
            seen = view_of(rows[own], attention[own], states[own], 20, more=more)
            kept = tp.build_strategy(name).select(seen, torch.tensor([20] * len(rows[own]))).kept
            return [line.nonzero()[:, 0].tolist() for line in kept]

        together = picked(slice(None))
        assert together == [picked(row)[0] for row in range(3)]
        for kept in together:
            found = [token for token in equal if token in kept]
            assert found == equal[: len(found)]


@pytest.mark.parametrize("exact", [False, True])
def test_holov_takes_what_is_no_number_for_none(exact: bool) -> None:
    attention = torch.rand(1, 2, 64, generator=torch.Generator().manual_seed(0))
    strategy = tp.build_strategy("holov", exact_budget=exact)
    row = row_of([64], 0, list(range(64)))
    attention[0, 0, 5] = torch.nan
    kept = strategy.select(
        view_of([row], attention, torch.zeros(1, 64, 5)), torch.tensor([20])
    ).kept
    attention[0, :, 5] = 0
    clean = strategy.select(view_of([row], attention, torch.zeros(1, 64, 5)), torch.tensor([20]))
    assert torch.equal(kept, clean.kept)
    assert kept.sum() > 10
    assert not kept[0, 5]
