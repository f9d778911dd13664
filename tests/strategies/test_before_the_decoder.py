"""Methods that read the vision tower, against their descriptions, written again with loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import second
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_tiles import Row, budgets, cases, ranked, row_of, signals, view_of
from models import ROWS, batch, build
from torch import Tensor

import tokenprune as tp
from tokenprune.strategy import HasPatches, Tiles

# ------------------------------------------------------------------------- the methods, once again


def fastervlm(row: Row, scores: list[float], keep: int) -> list[int]:
    parts, rest = budgets(row, keep)
    chosen = row[1][:rest]
    for tile, count in zip(row[0], parts, strict=True):
        chosen = chosen + ranked(tile, scores)[:count]
    return sorted(chosen)


def vispruner(
    row: Row, scores: list[float], states: list[list[float]], keep: int, important: float
) -> list[int]:
    def alike(a: int, b: int) -> float:
        lengths = sum(x * x for x in states[a]) ** 0.5, sum(x * x for x in states[b]) ** 0.5
        return sum(x * y for x, y in zip(states[a], states[b], strict=True)) / (
            lengths[0] * lengths[1]
        )

    parts, rest = budgets(row, keep)
    chosen = row[1][:rest]
    for tile, count in zip(row[0], parts, strict=True):
        order = ranked(tile, scores)
        first = int(count * important)
        others = order[first:]
        while len(others) > count - first:
            even, odd = others[::2], others[1::2]
            drop = min(8, len(others) - (count - first), len(even))
            likeness = {a: max((alike(a, b) for b in odd), default=-2.0) for a in even}
            even = sorted(even, key=lambda token: -likeness[token])  # stable
            others = even[drop:] + odd
        chosen = chosen + order[:first] + others
    return sorted(chosen)


def prumerge(
    row: Row,
    scores: list[float],
    keys: list[list[float]],
    keep: int,
    neighbours: int,
    spread: float,
    count: str = "schedule",
) -> dict[int, dict[int, float]]:
    """Of each survivor's seat, the tokens that it is mixed from, and their weights."""

    def unit(vector: list[float]) -> list[float]:
        length = sum(x * x for x in vector) ** 0.5
        return [x / length for x in vector]

    units = [unit(key) for key in keys]
    parts, rest = budgets(row, keep)
    adapts = count == "outliers" and keep < sum(map(len, row[0])) + len(row[1])
    found = second.outliers(row[0], scores, spread > 0) if adapts else []
    mixed: dict[int, dict[int, float]] = {}
    if not adapts:
        mixed |= {token: {token: 1.0} for token in row[1][:rest]}
    for number, (tile, part) in enumerate(zip(row[0], parts, strict=True)):
        order = ranked(tile, scores)
        even = int((part - 1) * spread)
        kept = order[: max(0, part - 1 - even)]
        chosen = found[number][0] + found[number][1] if adapts else []
        fewer = adapts and len(chosen) + 1 <= part
        part = len(chosen) + 1 if fewer else part
        if part == len(tile):
            mixed |= {token: {token: 1.0} for token in tile}
            continue
        if part == 0:
            continue
        others = sorted(set(tile) - set(kept))
        if fewer:
            kept = chosen
        elif even:  # of n tokens and m steps, those at which the rounded number of steps goes on
            steps = [(place * even + len(others) // 2) // len(others) for place in
                     range(len(others) + 1)]  # fmt: skip
            kept = kept + [
                own for own, a, b in zip(others, steps, steps[1:], strict=False) if b > a
            ]
        assert len(kept) == part - 1
        dropped = [token for token in order if token not in kept]
        for token in kept:
            likeness = {
                other: sum(a * b for a, b in zip(units[token], units[other], strict=True))
                for other in tile
                if other != token
            }
            near = sorted(likeness, key=lambda other: -likeness[other])[:neighbours]
            mixed[token] = {token: 1.0} | {other: scores[other] for other in near}
        mixed[dropped[0]] = {token: scores[token] for token in dropped}
    return mixed


def visionzip(
    row: Row, scores: list[float], keys: list[list[float]], keep: int, contextual: float
) -> dict[int, dict[int, float]]:
    """Of each survivor's seat, the tokens that it is mixed from; keys are (H, E) a token, flat."""

    def metric(token: int) -> list[float]:
        half = len(keys[token]) // 2
        mean = [(a + b) / 2 for a, b in zip(keys[token][:half], keys[token][half:], strict=True)]
        length = sum(x * x for x in mean) ** 0.5
        return [x / length for x in mean]

    parts, rest = budgets(row, keep)
    mixed: dict[int, dict[int, float]] = {token: {token: 1.0} for token in row[1][:rest]}
    for tile, count in zip(row[0], parts, strict=True):
        num_targets = int(count * contextual)
        dominant = ranked(tile, scores)[: count - num_targets]
        others = [token for token in tile if token not in dominant]
        step = max(1, len(others) // num_targets) if num_targets else 1
        targets = others[::step][:num_targets]
        members: dict[int, list[int]] = {token: [] for token in targets}
        for token in others:
            if token not in members and targets:
                likeness = [
                    sum(a * b for a, b in zip(metric(token), metric(target), strict=True))
                    for target in targets
                ]
                members[targets[likeness.index(max(likeness))]].append(token)
        mixed |= {token: {token: 1.0} for token in dominant}
        for target, own in members.items():
            mixed[target] = {target: 1.0} | {token: 1 / len(own) for token in own}
    return mixed


@pytest.mark.matrix
@given(case=cases())
def test_fastervlm(case: Any) -> None:
    rows, width, keep, seed = case
    attention, states = signals(rows, width, seed)
    seen = view_of(rows, attention.float(), states.float())
    kept = tp.build_strategy("fastervlm").select(seen, torch.tensor(keep)).kept
    for number, row in enumerate(rows):
        scores = attention[number].float().mean(0).tolist()
        assert kept[number].nonzero()[:, 0].tolist() == fastervlm(row, scores, keep[number])


@pytest.mark.matrix
@given(case=cases(), important=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_vispruner(case: Any, important: float) -> None:
    rows, width, keep, seed = case
    attention, states = signals(rows, width, seed)
    seen = view_of(rows, attention.float(), states)  # in float64 no likeness is a tie
    strategy = tp.build_strategy("vispruner", important=important)
    kept = strategy.select(seen, torch.tensor(keep)).kept
    for number, row in enumerate(rows):
        scores = attention[number].float().mean(0).tolist()
        expected = vispruner(row, scores, states[number].tolist(), keep[number], important)
        assert kept[number].nonzero()[:, 0].tolist() == expected


@pytest.mark.matrix
@given(
    case=cases(),
    neighbours=st.sampled_from([0, 3]),
    spread=st.sampled_from([0.0, 0.5, 1.0]),
    count=st.sampled_from(["schedule", "outliers"]),
)
def test_prumerge(case: Any, neighbours: int, spread: float, count: str) -> None:
    rows, width, keep, seed = case
    attention, keys = signals(rows, width, seed)
    attention = attention[:, :1] ** 9  # some are far from the rest
    counts = [sum(map(len, tiles)) + len(newlines) for tiles, newlines in rows]
    most = max(map(min, counts, keep))
    seen = view_of(rows, attention.float(), keys, most)
    fields = {"neighbours": neighbours, "spread": spread, "count": count}
    strategy = tp.build_strategy("prumerge", **fields)
    selection = strategy.select(seen, torch.tensor(keep))
    assert selection.weights.shape == (len(rows), most, width)
    for number, row in enumerate(rows):
        scores = attention[number, 0].float().tolist()
        own = keys[number].tolist()
        mixed = prumerge(row, scores, own, keep[number], neighbours, spread, count)
        seats = selection.kept[number].nonzero()[:, 0].tolist()
        assert seats == sorted(mixed)
        for place, seat in enumerate(seats):
            expected = torch.zeros(width)
            for token, weight in mixed[seat].items():
                expected[token] += weight
            torch.testing.assert_close(selection.weights[number, place], expected)


@pytest.mark.matrix
@given(case=cases(), contextual=st.sampled_from([0.0, 10 / 64, 0.5, 1.0]))
def test_visionzip(case: Any, contextual: float) -> None:
    rows, width, keep, seed = case
    attention, keys = signals(rows, width, seed)
    keys = keys[..., :4].contiguous()
    counts = [sum(map(len, tiles)) + len(newlines) for tiles, newlines in rows]
    most = max(map(min, counts, keep))
    seen = view_of(rows, attention.float(), keys, most)
    strategy = tp.build_strategy("visionzip", contextual=contextual)
    selection = strategy.select(seen, torch.tensor(keep))
    assert selection.weights.shape == (len(rows), most, width)
    for number, row in enumerate(rows):
        scores = attention[number].float().sum(0).tolist()
        mixed = visionzip(row, scores, keys[number].tolist(), keep[number], contextual)
        seats = selection.kept[number].nonzero()[:, 0].tolist()
        assert seats == sorted(mixed)
        for place, seat in enumerate(seats):
            expected = torch.zeros(width)
            for token, weight in mixed[seat].items():
                expected[token] += weight
            torch.testing.assert_close(selection.weights[number, place], expected)


def test_visionzip_as_published_has_its_shares() -> None:
    """162 and 30, 108 and 20, 54 and 10 of 576."""
    attention, keys = signals([row_of([576], 0, list(range(576)))], 576, 0)
    seen = view_of([row_of([576], 0, list(range(576)))], attention.float(), keys[..., :4], 192)
    for keep, mixed in ((192, 30), (128, 20), (64, 10)):
        selection = tp.build_strategy("visionzip").select(seen, torch.tensor([keep]))
        assert int(selection.kept.sum()) == keep
        of_several = (selection.weights[0, :keep] > 0).sum(1) > 1
        assert int(of_several.sum()) == mixed
    with pytest.raises(ValueError, match=r"VisionZip.contextual: expected a fraction"):
        tp.build_strategy("visionzip", contextual=2)


def test_prumerge_plus_is_prumerge_with_even_distances() -> None:
    plus = tp.build_strategy("prumerge_plus")
    assert plus.spread == 0.5
    rows = [row_of([20], 0, list(range(20)))]
    attention, keys = signals(rows, 20, 0)
    seen = view_of(rows, attention[:, :1].float(), keys, 8)
    theirs = tp.build_strategy("prumerge", spread=0.5).select(seen, torch.tensor([8]))
    assert torch.equal(plus.select(seen, torch.tensor([8])).weights, theirs.weights)


def test_outliers_say_how_many_of_576_survive() -> None:
    """As released: int(N rho) and one; and of PruMerge+ every 6th place besides, if rho is 5 %."""
    rows = [row_of([576], 0, list(range(576)))]
    attention, keys = signals(rows, 576, 0)
    attention = attention[:, :1].float() * 0.1
    attention[0, 0, 100:130] = 1 + torch.arange(30) / 100
    seen = view_of(rows, attention, keys, 575)
    for name, expected in (("prumerge", 31), ("prumerge_plus", 30 + 96 - 5 + 1)):
        strategy, schedule, _ = tp.published(name, 32)
        assert not strategy.keeps_exactly
        keep = schedule.count(0, 576)
        kept = strategy.select(dataclasses.replace(seen, max_keep=keep), torch.tensor([keep])).kept
        assert int(kept.sum()) == expected
        assert kept[0, 100:130].all()
        # The schedule is an upper bound, and what may keep all keeps all.
        for bound, left in ((20, 20), (576, 576)):
            own = dataclasses.replace(seen, max_keep=bound)
            assert int(strategy.select(own, torch.tensor([bound])).kept.sum()) == left


def test_prumerge_refuses_what_is_no_part() -> None:
    with pytest.raises(ValueError, match=r"PruMerge.spread: expected a fraction in \[0, 1\]"):
        tp.build_strategy("prumerge", spread=2)
    with pytest.raises(ValueError, match=r"PruMerge.count: expected one of \['outliers', 'sched"):
        tp.build_strategy("prumerge", count="image")
    with pytest.raises(ValueError, match=r"PruMerge.neighbours: expected .* got -1"):
        tp.build_strategy("prumerge", neighbours=-1)


def test_vispruner_refuses_what_is_no_part() -> None:
    with pytest.raises(ValueError, match=r"VisPruner.important: expected a fraction in \[0, 1\]"):
        tp.build_strategy("vispruner", important=2)


def vscan(
    near: list[float], far: list[float], units: list[list[float]], side: int, keep: int, window: int
) -> dict[int, list[int]]:
    """Of each survivor of a square grid, the tokens that it is the mean of."""
    kept: list[int] = []
    windows = {(t // side // window, t % side // window) for t in range(side * side)}
    share = keep // 2 // len(windows)
    for own in sorted(windows):
        tokens = [t for t in range(side * side)
                  if (t // side // window, t % side // window) == own]  # fmt: skip
        kept += ranked(tokens, near)[:share]
    others = [token for token in range(side * side) if token not in kept]
    kept += ranked(others, far)[: keep - keep // 2]
    members = {token: [token] for token in sorted(kept)}
    for token in range(side * side):
        if token not in members and kept:
            likeness = {
                seat: sum(a * b for a, b in zip(units[token], units[seat], strict=True))
                for seat in sorted(kept)
            }
            members[max(likeness, key=lambda seat: likeness[seat])].append(token)
    return members


@pytest.mark.parametrize("keep", [0, 1, 7, 16, 18, 35, 36])
@pytest.mark.parametrize("exact", [False, True])
def test_vscan(keep: int, exact: bool) -> None:
    side, count = 6, 36
    strategy = tp.build_strategy("vscan", window=3, exact_budget=exact)
    own = torch.Generator().manual_seed(keep)
    near, far = torch.rand(2, 1, 2, count, generator=own)
    states = torch.randn(1, count, 5, generator=own)
    order = torch.arange(count)
    places = torch.stack([order * 0, order * 0, order // side, order % side], 1)[None]

    def signal(need: Any) -> Any:
        if isinstance(need, tp.VisionRows):
            return near if need.layer == 5 else far
        known = {tp.Projected(): states, Tiles(): torch.zeros(1, count, dtype=torch.int64),
                 HasPatches(): torch.ones(1, count, dtype=torch.bool)}  # fmt: skip
        return known[need]

    seen = view_of([row_of([count], 0, list(range(count)))], near, states, keep)
    seen = dataclasses.replace(seen, _signal=signal, _places=lambda: places)
    selection = strategy.select(seen, torch.tensor([keep]))
    kept = selection.kept[0].nonzero()[:, 0].tolist()
    units = torch.nn.functional.normalize(states[0].double(), dim=-1).tolist()
    members = vscan(near[0].mean(0).tolist(), far[0].mean(0).tolist(), units, side, keep, 3)
    if exact:
        assert len(kept) == keep
        return
    if keep == count:
        members = {token: [token] for token in range(count)}
    assert kept == sorted(members)
    assert len(kept) == (keep if keep == count else keep // 2 // 4 * 4 + keep - keep // 2)
    if keep:
        for place, seat in enumerate(kept):
            expected = torch.zeros(count)
            expected[members[seat]] = 1 / len(members[seat])
            torch.testing.assert_close(selection.weights[0, place], expected)


@pytest.mark.parametrize("keep", [288, 192, 96])
def test_vscan_s_published_budgets_fill_their_windows(keep: int) -> None:
    """Of 24 x 24 patches in 16 windows: half of 288, 192 and 96 is 9, 6 and 3 a window."""
    seen, near, _, places = vscan_view([[(24, 24)]], keep, 4)
    kept = tp.build_strategy("vscan").select(seen, torch.tensor([keep])).kept[0]
    assert int(kept.sum()) == keep
    window = places[:, 2] // 6 * 4 + places[:, 3] // 6
    for number in range(16):
        best = near.masked_fill(window != number, -1).topk(keep // 2 // 16).indices
        assert kept[best].all()


def vscan_view(
    grids: list[list[tuple[int, int]]], keep: int, seed: int, known: bool = True
) -> tuple[tp.TokenView, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row of images with one grid each (rows, columns); scores near and far, and places."""
    (row,) = grids
    count = sum(tall * wide for tall, wide in row)
    own = torch.Generator().manual_seed(seed)
    near, far = torch.rand(2, 1, 2, count, generator=own)
    states = torch.randn(1, count, 5, generator=own)
    places = torch.tensor(
        [
            [image, 0, r, c] if known else [image, -1, -1, -1]
            for image, (tall, wide) in enumerate(row)
            for r in range(tall)
            for c in range(wide)
        ]
    )[None]

    def signal(need: Any) -> Any:
        if isinstance(need, tp.VisionRows):
            return near if need.layer == 5 else far
        return {tp.Projected(): states, Tiles(): places[..., 0],
                HasPatches(): torch.ones(1, count, dtype=torch.bool)}[need]  # fmt: skip

    seen = view_of([row_of([count], 0, list(range(count)))], near, states, keep)
    seen = dataclasses.replace(seen, _signal=signal, _places=lambda: places)
    return seen, near[0].mean(0), far[0].mean(0), places[0]


def test_vscan_gives_each_image_its_share() -> None:
    """Three images in a row are chosen from as each alone, however they are attended to."""
    strategy = tp.build_strategy("vscan", window=3)
    seen, near, far, places = vscan_view([[(6, 6), (6, 6), (3, 6)]], 45, 1)
    scale = torch.tensor([3.0, 1.0, 0.1])[places[:, 0]]
    seen = dataclasses.replace(
        seen,
        _signal=lambda need: (
            (near if need.layer == 5 else far).mul(scale).expand(1, 2, -1)
            if isinstance(need, tp.VisionRows)
            else vscan_view([[(6, 6), (6, 6), (3, 6)]], 45, 1)[0]._signal(need)
        ),
    )
    kept = strategy.select(seen, torch.tensor([45])).kept[0]
    start = 0
    for image, (rows, columns, budget) in enumerate(((6, 6, 18), (6, 6, 18), (3, 6, 9))):
        size = rows * columns
        own = slice(start, start + size)
        chosen: list[int] = []
        for top in range(0, rows, 3):
            for left in range(0, columns, 3):
                tokens = [r * columns + c for r in range(top, top + 3)
                          for c in range(left, left + 3)]  # fmt: skip
                number = budget // 2 // (rows // 3 * columns // 3)
                chosen += ranked(tokens, near[own].tolist())[:number]
        others = [token for token in range(size) if token not in chosen]
        chosen += ranked(others, far[own].tolist())[: budget - budget // 2]
        assert kept[own].nonzero()[:, 0].tolist() == sorted(chosen), image
        start += size


@pytest.mark.parametrize("shape", [(9, 9), (4, 13), (3, 2), (8, 8)])
@pytest.mark.parametrize("keep", [5, 24])
def test_vscan_by_the_rule_for_qwen(shape: tuple[int, int], keep: int) -> None:
    """Whole windows only, the rest joins the last; greedy over all scores, each has its limit."""
    keep = min(keep, shape[0] * shape[1])
    strategy = tp.build_strategy("vscan", window=4, limits="ceil")
    seen, near, far, places = vscan_view([[shape]], keep, 2)
    kept = strategy.select(seen, torch.tensor([keep])).kept[0].nonzero()[:, 0].tolist()
    if keep == len(places):
        assert kept == list(range(keep))
        return
    tall, wide = (max(1, side // 4) for side in shape)
    window = {
        token: (min(row // 4, tall - 1), min(column // 4, wide - 1))
        for token, (row, column) in enumerate(places[:, 2:].tolist())
    }
    limit = -(-(keep // 2) // (tall * wide))
    chosen: list[int] = []
    for token in ranked(list(window), near.tolist()):
        inside = [own for own in chosen if window[own] == window[token]]
        if len(chosen) < keep // 2 and len(inside) < limit:
            chosen.append(token)
    others = [token for token in window if token not in chosen]
    chosen += ranked(others, far.tolist())[: keep - keep // 2]
    assert kept == sorted(chosen)
    assert len(kept) == keep


def test_vscan_without_a_grid_spends_its_whole_budget_globally() -> None:
    seen, _, far, _ = vscan_view([[(6, 6), (6, 6)]], 20, 3, known=False)
    kept = tp.build_strategy("vscan", window=3).select(seen, torch.tensor([20])).kept[0]
    for own in (slice(0, 36), slice(36, 72)):
        best = ranked(list(range(36)), far[own].tolist())[:10]
        assert kept[own].nonzero()[:, 0].tolist() == sorted(best)


def test_prumerge_plus_runs_however_few_tokens_there_are() -> None:
    _, schedule, _ = tp.published("prumerge_plus", num_layers=32)
    for number in (2, 16, 64, 256, 294, 295, 576):
        assert schedule.lengths(32, number)[0] == number - 1
    assert schedule.lengths(32, 2880)[0] < 2880


def test_a_budget_of_what_outliers_ask_for_is_done_by_their_rule() -> None:
    scores = [0.0] * 20
    scores[1], scores[3], scores[5] = 9.0, 8.0, 7.0
    strategy = tp.build_strategy("prumerge", spread=0.5)
    found = []
    for keep in (14, 15):
        seen = view_of([row_of([20], 0, list(range(20)))],
                       torch.tensor(scores).expand(1, 2, -1), torch.randn(
                           1, 20, 4, generator=torch.Generator().manual_seed(0)), keep)  # fmt: skip
        found.append(strategy.select(seen, torch.tensor([keep])).kept[0].nonzero()[:, 0].tolist())
    assert found[0] == found[1]
    assert len(found[0]) == 14


def test_windows_of_vscan_end_with_their_grid() -> None:
    """Of three tiles of an image and another image, in one row; a newline is in none."""
    order = torch.arange(4)
    spots = torch.stack([order // 2, order % 2], 1)
    grids = ((0, 0), (0, 1), (0, 2), (1, 0))
    parts = [torch.cat([torch.tensor([own] * 4), spots], 1) for own in grids]
    places = torch.cat([*parts, torch.tensor([[1, -1, -1, -1]])])[None]
    tiles = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [17]])
    window, first = tp.build_strategy("vscan", window=2)._windows(places, tiles)
    assert window.tolist() == [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [17]]
    assert first.nonzero()[:, 1].tolist() == [0, 4, 8, 12]


def test_vscan_is_composed() -> None:
    strategy, schedule, positions = tp.published("vscan", num_layers=32)
    assert strategy == tp.PerStage((tp.build_strategy("vscan"), tp.build_strategy("pyramiddrop")))
    assert schedule.lengths(32, 576)[::16] == [288, 96]
    assert positions == "renumbered"
    with pytest.raises(ValueError, match=r"VScan.window: expected an integer >= 1, got 0"):
        tp.build_strategy("vscan", window=0)


# --------------------------------------------------------------------------------- in a whole model


@pytest.mark.parametrize("name", ["fastervlm", "vispruner"])
def test_as_published_on_a_model(name: str) -> None:
    """From the tower's own eager attention and hidden states, for images of each row."""
    model = build("llava", "eager")
    inputs = batch(model, ROWS)
    strategy, schedule, positions = tp.published(name, num_layers=6)
    assert (schedule.stages[0].layer, positions) == (0, "renumbered")
    with torch.no_grad():
        seen = model.model.vision_tower(
            inputs["pixel_values"], output_attentions=True, output_hidden_states=True
        )
        with tp.prune(model, strategy, schedule, positions) as trace:
            model(**inputs)
    attention = seen.attentions[-2][:, :, 0, 1:].mean(1)
    states = seen.hidden_states[-2][:, 1:].double()
    images = iter(range(len(attention)))
    for number, row in enumerate(ROWS):
        own = [next(images) for segment in row.segments if not isinstance(segment, int)]
        tiles = [list(range(16 * tile, 16 * tile + 16)) for tile in range(len(own))]
        keep = round(16 * len(own) * schedule.stages[0].keep)
        scores = [score for image in own for score in attention[image].tolist()]
        hidden = [state for image in own for state in states[image].tolist()]
        expected = fastervlm((tiles, []), scores, keep)
        if name == "vispruner":
            expected = vispruner((tiles, []), scores, hidden, keep, 0.5)
        assert trace.stages[0].kept[number].tolist() == expected


def test_prumerge_on_a_model() -> None:
    """From the tower's own projections, for an image."""
    model = build("llava", "eager")
    inputs = batch(model, [ROWS[0]])
    strategy = tp.build_strategy("prumerge", neighbours=4, spread=0.5, count="schedule")
    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    heard: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: heard.update({name: output[0]})
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model(**inputs)
        with tp.prune(model, strategy, tp.Schedule.one_shot(0, 0.4), "renumbered") as trace:
            model(**inputs)
    for hook in hooks:
        hook.remove()
    logits = heard["k_proj"].double() @ heard["q_proj"][0].double() / 32**0.5
    scores = logits.softmax(0)[1:].tolist()
    keys = heard["k_proj"][1:].double().tolist()
    expected = prumerge(([list(range(16))], []), scores, keys, 6, 4, 0.5)
    stage = trace.stages[0]
    assert stage.kept[0].tolist() == sorted(expected)
    for own, seat in zip(stage.weights[0], sorted(expected), strict=True):
        theirs = torch.zeros(16)
        for token, weight in expected[seat].items():
            theirs[token] += weight
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5)


def test_tiles_of_a_mosaic_share_the_budget_and_newlines_go_first() -> None:
    model = build("llava_next")
    inputs = batch(model, [ROWS[0]])
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    schedule = tp.Schedule.one_shot(layer=0, keep=0.5)
    with torch.no_grad(), tp.prune(model, tp.build_strategy("fastervlm"), schedule) as trace:
        model(**inputs)
    (kept,) = trace.stages[0].kept
    # The whole image has 16 tokens; the mosaic's rows are 8 patches, 4 of each tile, and a newline.
    of_mosaic = kept[kept >= 16] - 16
    assert not (of_mosaic % 9 == 8).any()
    rows = (count - 16) // 9
    sizes = torch.tensor([16, 4 * rows, 4 * rows])
    exact = len(kept) * sizes / sizes.sum()
    own = [int((kept < 16).sum()), int((of_mosaic % 9 < 4).sum()), int((of_mosaic % 9 >= 4).sum())]
    assert sum(own) == len(kept)
    assert (torch.tensor(own) - exact).abs().max() < 1
