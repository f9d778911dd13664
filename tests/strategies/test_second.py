"""Published methods on made-up views, beside a second, slow implementation of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import second
import torch
from made_views import Made, made
from torch import Tensor

import tokenprune as tp

CASES = 300
FEW = 60
METHODS: dict[str, tuple[tp.PruningStrategy, Callable[..., second.Row]]] = {
    "cdpruner": (tp.build_strategy("cdpruner"), second.cdpruner),
    "dart": (tp.build_strategy("dart"), second.dart),
    "dart-exact": (tp.build_strategy("dart", exact_budget=True), partial(second.dart, exact=True)),
    "divprune": (tp.build_strategy("divprune"), second.divprune),
    "divprune-again": (
        tp.build_strategy("divprune", exact_reference=True),
        partial(second.divprune, again=True),
    ),
    "evs": (tp.build_strategy("evs"), second.evs),
    "evs-images": (
        tp.build_strategy("evs", frames="images"),
        partial(second.evs, images=True),
    ),
    "pool": (tp.build_strategy("pool"), second.pool),
    "sparsevlm": (tp.build_strategy("sparsevlm"), second.sparsevlm),
    "sparsevlm-1": (
        tp.build_strategy("sparsevlm", version="1.0", scale=2.0, bias=1.0),
        partial(second.sparsevlm_1, scale=2.0, bias=1.0),
    ),
    "sparsevlm-1-as-published": (
        tp.build_strategy("sparsevlm", version="1.0"),
        second.sparsevlm_1,
    ),
    "sparsevlm-2": (tp.build_strategy("sparsevlm", version="2.0"), second.sparsevlm_2),
    "v2drop": (tp.build_strategy("v2drop"), second.v2drop),
    "vtw": (tp.build_strategy("vtw"), second.vtw),
}
#: Those whose scores are exponentials and logarithms, which float32 rounds.
ROUNDED: dict[str, tuple[tp.PruningStrategy, Callable[..., list[list[second.Range]]]]] = {
    "priortr": (tp.build_strategy("priortr"), second.priortr),
    "priortr-last": (
        tp.build_strategy("priortr", queries="last"),
        partial(second.priortr, queries="last"),
    ),
    "vidcom2": (tp.build_strategy("vidcom2"), second.vidcom2),
    "vidcom2-all-channels": (
        tp.build_strategy("vidcom2", channels=1.0, temperature=0.1),
        partial(second.vidcom2, channels=1.0, temperature=0.1),
    ),
}


@pytest.mark.parametrize(
    "seeds",
    [range(FEW), pytest.param(range(FEW, CASES), marks=pytest.mark.matrix)],
    ids=["few", "many"],
)
@pytest.mark.parametrize("name", [*METHODS, *ROUNDED])
@pytest.mark.share(3)
def test_the_same_picks_and_the_same_mixes(name: str, seeds: range) -> None:
    for seed in seeds:
        (compare if name in METHODS else compare_rounded)(name, made(seed))


def test_the_same_mixes_of_many_clusters() -> None:
    for seed in range(40):
        compare("sparsevlm", made(seed, longest=300))


def compare(name: str, batch: Made) -> None:
    """A method and its second implementation on a batch."""
    strategy, slow = METHODS[name]
    selection = strategy.select(batch.view, batch.keep)
    assert selection.kept.dtype == torch.bool
    for row, count in enumerate(batch.counts):
        seats, mixes = slow(batch, row)
        assert selection.kept[row].nonzero()[:, 0].tolist() == seats
        if strategy.keeps_exactly:
            assert len(seats) == min(count, int(batch.keep[row]))
        assert (selection.weights is None) == (mixes is None)
        if mixes is None:
            continue
        expected = torch.zeros(len(seats), batch.view.valid.shape[1])
        for survivor, mix in enumerate(mixes):
            for token, weight in mix.items():
                expected[survivor, token] = float(weight)
        assert selection.weights.shape[1] == batch.view.max_keep
        ours = selection.weights[row, : len(seats)]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def compare_rounded(name: str, batch: Made) -> None:
    """The same scores; the same picks but for tokens whose scores rounding does not tell apart."""
    strategy, slow = ROUNDED[name]
    selection = strategy.select(batch.view, batch.keep)
    assert selection.scores is not None
    for row, count in enumerate(batch.counts):
        kept = selection.kept[row].nonzero()[:, 0].tolist()
        scores = selection.scores[row, :count].tolist()
        keep = min(count, int(batch.keep[row]))
        assert kept == sorted(second.best(scores, list(range(count)), keep))
        assert any(fit(scores, kept, ranges) for ranges in slow(batch, row))


def fit(scores: list[float], kept: list[int], ranges: list[second.Range]) -> bool:
    """Whether scores are as they may be, and no token was kept for one that is better."""
    spare = [1e-5 * max(map(abs, own)) + 1e-7 for own in ranges]
    same = all(
        least - own <= score <= most + own
        for score, (least, most), own in zip(scores, ranges, spare, strict=True)
    )
    weakest = min((ranges[i][1] + spare[i] for i in kept), default=0.0)
    dropped = [i for i in range(len(scores)) if i not in kept]
    return same and all(not kept or ranges[i][0] - spare[i] <= weakest for i in dropped)


@pytest.mark.parametrize("name", [*METHODS, *ROUNDED])
@pytest.mark.share(3)
def test_who_keeps_all_changes_nothing(name: str) -> None:
    strategy, _ = (METHODS | ROUNDED)[name]
    for seed in range(60):
        batch = made(seed)
        # What may be fewer is fewer, unless all that there ever was may stay.
        keep = torch.tensor(batch.counts if strategy.keeps_exactly else batch.original)
        view = tp.TokenView(**{**vars(batch.view), "max_keep": max(batch.counts)})
        selection = strategy.select(view, keep)
        assert torch.equal(selection.kept, view.valid)
        if selection.weights is not None:
            for row, count in enumerate(batch.counts):
                assert torch.equal(selection.weights[row, :count, :count], torch.eye(count))


# ---------------------------------------------------------------------------------- ties and limits


def one_row(answers: dict[tp.Need, object], number: int, keep: int, **more: Tensor) -> tp.TokenView:
    """A view of one row whose tokens all exist, and what is asked of it."""
    valid = torch.ones(1, number, dtype=torch.bool)
    places = torch.full((1, number, 4), -1)
    return tp.TokenView(
        layer=2,
        num_layers=8,
        num_original=torch.tensor([number]),
        max_keep=min(keep, number),
        ragged=False,
        _valid=lambda: valid,
        _positions=lambda: torch.arange(number)[None],
        _hidden=lambda: more.get("hidden", torch.zeros(1, number, 4)),
        _places=lambda: places,
        _signal=answers.__getitem__,
    )


def kept(strategy: tp.PruningStrategy, view: tp.TokenView, keep: int) -> list[int]:
    return strategy.select(view, torch.tensor([keep])).kept[0].nonzero()[:, 0].tolist()


def question(number: int = 2, after: int = 2, length: int = 0) -> tp.TextView:
    return tp.TextView(
        embeddings=torch.eye(4)[:number][None],
        valid=torch.ones(1, number, dtype=torch.bool),
        follows=torch.arange(number)[None] >= number - after,
        positions=torch.arange(number)[None] + length,
    )


def padded(view: tp.TokenView, number: int) -> tp.TokenView:
    """The view, as if but the first tokens were none of the row's."""
    valid = torch.arange(view.valid.shape[1])[None] < number
    return dataclasses.replace(
        view, ragged=True, num_original=valid.sum(1), max_keep=number, _valid=lambda: valid
    )


def scores_of(strategy: tp.PruningStrategy, view: tp.TokenView) -> Tensor:
    scores = strategy.select(view, view.num_original).scores
    assert scores is not None
    return scores[0, : int(view.num_original)]


@pytest.mark.parametrize("number", [2, 3], ids=["alone", "padded"])
def test_priortr_by_hand(number: int) -> None:
    """Of 2 tokens, beside which one may be that does not exist."""
    rows = torch.tensor([[5.0, 1.0, 8.0], [1.0, 1.0, 4.0], [3.0, 0.0, 2.0]])[:, :number]
    # Two heads that pay the mean of what they pay.
    attention = torch.stack([rows / 2, rows * 3 / 2])[None]
    for queries, after, expected in (
        ("text", 2, [0.8 * math.log(1.6), 0.2 * math.log(0.4)]),
        ("last", 2, [math.log(2), 0.0]),
        ("last", 1, [0.0, 0.0]),
        ("text", 0, [0.0, 0.0]),
        ("last", 0, [0.0, 0.0]),
    ):
        answers = {
            tp.Text(): question(3, after),
            tp.DecoderRows("text", "previous"): attention,
        }
        view = padded(one_row(answers, number, 2), 2)
        scores = scores_of(tp.build_strategy("priortr", queries=queries), view)
        torch.testing.assert_close(scores, torch.tensor(expected))


def test_evs_by_hand() -> None:
    cells = [
        (0, 0, 0, 0),  # of equal cells the first counts
        (0, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 1, 0, 1),  # nothing there before
        (0, 2, 0, 0),
        (-1, -1, -1, -1),
        (1, 1, 0, 0),  # another video
        (0, 1, -1, -1),
        (0, 2, -1, -1),
        (0, 3, 0, 0),
        (0, 5, 0, 0),  # the frame before is gone
    ]
    axes = torch.eye(4)
    tokens = axes[[0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1]]
    tokens[9] = -tokens[9]
    answers = {tp.Projected(): tokens[None], tp.Videos(): torch.ones(1, len(cells)).bool()}
    view = one_row(answers, len(cells), len(cells))
    view = dataclasses.replace(view, _places=lambda: torch.tensor([cells]))
    scores = scores_of(tp.build_strategy("evs"), view).tolist()
    assert scores == [255, 255, 0, 255, 1, 255, 255, 255, 255, 2, 255]
    # A token that does not exist is nobody's earlier one.
    view = dataclasses.replace(view, _valid=lambda: torch.tensor([[False] + [True] * 10]))
    scores = tp.build_strategy("evs").score(dataclasses.replace(view, ragged=True))[0, 1:].tolist()
    assert scores == [255, 1, 255, 1, 255, 255, 255, 255, 2, 255]
    # Tiles of an image do not follow one another.
    answers[tp.Videos()] = torch.zeros(1, len(cells)).bool()
    assert set(scores_of(tp.build_strategy("evs"), view).tolist()) == {255}


def test_evs_sees_no_change_in_rounding() -> None:
    """Of a still video the first tokens stay, whatever products come to."""
    for seed in range(20):
        own = torch.Generator().manual_seed(seed)
        frame = torch.randn(1, 9, 48, generator=own)
        cells = [(0, f, 0, c) for f in range(4) for c in range(9)]
        answers = {tp.Projected(): frame.repeat(1, 4, 1), tp.Videos(): torch.ones(1, 36).bool()}
        view = dataclasses.replace(
            one_row(answers, 36, 20), _places=lambda c=cells: torch.tensor([c])
        )
        assert kept(tp.build_strategy("evs"), view, 20) == list(range(20))


def test_vidcom2_counts_what_is_of_no_frame_in_none() -> None:
    """A newline after the last frame stays, and shares among frames are as without it."""
    own = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 8 * 16, 64, generator=own) * 0.2 + torch.randn(64, generator=own)
    tokens[:, 5 * 16 : 6 * 16] += torch.randn(64, generator=own)
    cells = [(0, f, 0, c) for f in range(8) for c in range(16)]
    strategy = tp.build_strategy("vidcom2")

    def picked(more: list[tuple[int, ...]], keep: int) -> list[int]:
        given = torch.cat([tokens, 5 * torch.randn(1, len(more), 64, generator=own)], 1)
        view = one_row({tp.Projected(): given}, 128 + len(more), keep)
        view = dataclasses.replace(view, _places=lambda: torch.tensor([[*cells, *more]]))
        return kept(strategy, view, keep)

    alone = picked([], 32)
    counts = torch.tensor(alone).div(16, rounding_mode="floor").bincount(minlength=8)
    assert counts[5] == counts.max() > counts.median()
    assert picked([(0, -1, -1, -1)], 33) == [*alone, 128]
    # A picture whose grid is unknown is a frame, and no newline.
    assert len(set(picked([(1, -1, -1, -1)] * 16, 32)) & set(range(128))) > 16


def test_what_is_no_number_comes_last_of_a_video() -> None:
    own = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 32, 8, generator=own)
    cells = torch.tensor([[(0, f, 0, c) for f in range(4) for c in range(8)]])
    clean = dataclasses.replace(one_row({tp.Projected(): tokens}, 32, 12), _places=lambda: cells)
    frames = {place // 8 for place in kept(tp.build_strategy("vidcom2"), clean, 12)}
    broken = tokens.clone()
    broken[0, 3, 2] = torch.inf
    view = dataclasses.replace(one_row({tp.Projected(): broken}, 32, 31), _places=lambda: cells)
    assert kept(tp.build_strategy("vidcom2"), view, 31) == [i for i in range(32) if i != 3]
    assert len(frames) > 1
    assert {place // 8 for place in kept(tp.build_strategy("vidcom2"), view, 12)} == frames


@pytest.mark.parametrize("number", [4, 5, 6], ids=["alone", "padded", "padded-more"])
def test_vidcom2_by_hand(number: int) -> None:
    """Two frames of two tokens, one of which is unlike all others; what pads say is nothing."""
    tokens = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [-1, 0], [-1, 0]])
    cells = torch.tensor([[0, frame, 0, column] for frame in range(3) for column in range(2)])
    view = one_row({tp.Projected(): tokens[None, :number]}, number, 4)
    view = dataclasses.replace(view, _places=lambda: cells[None, :number])
    view = padded(view, 4) if number > 4 else view
    # The second frame, which is less like the video, gets all that is shared out: 3, and 1.
    scores = scores_of(tp.build_strategy("vidcom2", channels=1.0), view)
    torch.testing.assert_close(scores, torch.tensor([-0.5 / 1, -1.5 / 1, -1.5 / 3, -0.5 / 3]))
    for keep, expected in ((1, [3]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        assert kept(tp.build_strategy("vidcom2", channels=1.0), view, keep) == expected


@pytest.mark.parametrize("pads", [0, 1, 2, 9])
def test_vidcom2_of_equal_tokens_in_one_frame(pads: int) -> None:
    """Ranks 0, 1 and 2 of a share of 3, however unlike them pads are."""
    tokens = torch.tensor([[1.0, 0]] * 3 + [[-1.0, 0]] * pads)
    view = padded(one_row({tp.Projected(): tokens[None]}, 3 + pads, 3), 3)
    scores = scores_of(tp.build_strategy("vidcom2", channels=1.0), view)
    torch.testing.assert_close(scores, torch.tensor([-0.5 / 3, -1.5 / 3, -2.5 / 3]))


def test_of_channels_that_vary_alike_vidcom2_reads_the_first() -> None:
    """Three channels, of which half are one: in the first one the last token is unlike the rest."""
    first, second, third = [1.0, 1, 1, -1], [-1.0, 1, 1, 1], [1.0, 1, -1, 1]
    for channels, expected, and_next in (
        ((first, second, [9.0, -9, 9, -9]), [3], [0, 3]),
        ((second, first, [9.0, -9, 9, -9]), [0], [0, 1]),
        ((first, second, [x / 2 for x in third]), [2], [0, 2]),
    ):
        view = one_row({tp.Projected(): torch.tensor(channels).T[None]}, 4, 4)
        assert kept(tp.build_strategy("vidcom2"), view, 1) == expected
        assert kept(tp.build_strategy("vidcom2"), view, 2) == and_next


def test_duplicates_are_picked_again_by_the_released_divprune_alone() -> None:
    tokens = torch.eye(4)[[0, 0, 0, 1, 1, 1]][None]
    view = one_row({tp.Projected(): tokens}, 6, 5)
    assert kept(tp.build_strategy("divprune"), view, 5) == [0, 1, 2, 3, 4]
    assert kept(tp.build_strategy("divprune", exact_reference=True), view, 5) == [0, 3]


@pytest.mark.parametrize("name", ["cdpruner", "divprune"])
def test_of_equal_tokens_the_first_is_picked(name: str) -> None:
    """Newlines are equal; products that ought to be equal differ in the last digit."""
    lasts = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, 37, 24, generator=generator)
        equal = [7, 15, 23, 31, 36]
        tokens[0, equal] = tokens[0, [7]]
        embeddings = torch.randn(1, 2, 24, generator=generator)
        words = dataclasses.replace(question(), embeddings=embeddings)
        view = one_row({tp.Projected(): tokens, tp.Text(): words}, 37, 20)
        picked = kept(tp.build_strategy(name), view, 20)
        assert not set(picked) & set(equal[1:])
        lasts += 7 in picked
    assert lasts > 10


def test_of_a_picture_shown_twice_the_first_tokens_are_picked() -> None:
    """All are as far from another as from themselves, whatever products come to."""
    for seed in range(20):
        tokens = torch.randn(1, 8, 48, generator=torch.Generator().manual_seed(seed)).repeat(
            1, 2, 1
        )
        picked = kept(tp.build_strategy("divprune"), one_row({tp.Projected(): tokens}, 16, 8), 8)
        assert picked == list(range(8))


def test_a_token_that_is_no_number_is_picked_last() -> None:
    tokens = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    tokens[0, 2] = torch.nan
    view = one_row({tp.Projected(): tokens, tp.Text(): question()}, 6, 5)
    assert kept(tp.build_strategy("divprune"), view, 5) == [0, 1, 3, 4, 5]
    view = one_row({tp.Projected(): tokens, tp.Text(): question()}, 6, 4)
    assert 2 not in kept(tp.build_strategy("cdpruner"), view, 4)
    hidden = tokens.clone()
    answers = {
        tp.Text(): question(),
        tp.Normed(): tp.TokensAndText(tokens, torch.randn(1, 2, 4)),
        tp.DecoderKeys("previous"): tp.TokensAndText(tokens[:, :, None], torch.randn(1, 2, 1, 4)),
        tp.Entered(): tokens,
        tp.DecoderRows("text", "previous"): torch.rand(1, 2, 2, 6),
    }
    view = one_row(answers, 6, 4, hidden=hidden)
    assert len(kept(tp.build_strategy("dart", exact_budget=True), view, 4)) == 4
    selection = tp.build_strategy("sparsevlm").select(view, torch.tensor([4]))
    assert int(selection.kept.sum()) == 4
    assert selection.weights is not None
    torch.testing.assert_close(selection.weights[0].sum(1), torch.ones(4))


def test_the_first_token_is_the_farthest_from_those_that_exist() -> None:
    """What is no number is no neighbour, although a right angle is nearer than all of these."""
    tokens = torch.tensor([[[-0.5, 0.8], [-0.6, -0.8], [1.0, 0.0], [torch.nan, 0.0]]])
    view = one_row({tp.Projected(): tokens}, 4, 1)
    assert kept(tp.build_strategy("divprune"), view, 1) == [2]


def test_more_tokens_than_dimensions_are_no_division_by_nothing() -> None:
    tokens = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(0))
    answers = {tp.Projected(): tokens, tp.Text(): question()}
    first = kept(tp.build_strategy("cdpruner"), one_row(answers, 40, 4), 4)
    more = kept(tp.build_strategy("cdpruner"), one_row(answers, 40, 20), 20)
    others = [i for i in range(40) if i not in first]
    assert more == sorted(first + others[:16])


def test_a_quarter_of_a_grid_is_pooled_two_by_two() -> None:
    cells = [(0, 0, row, column) for row in range(6) for column in range(8)]
    view = one_row({}, 48, 12)
    view = tp.TokenView(**{**vars(view), "_places": lambda: torch.tensor([cells])})
    weights = tp.build_strategy("pool").select(view, torch.tensor([12])).weights
    assert weights is not None
    image = torch.arange(48.0).view(6, 8)
    expected = torch.nn.functional.avg_pool2d(image[None, None], 2).flatten()
    torch.testing.assert_close(weights[0] @ image.flatten(), expected)


def test_sparsevlm_s_lists_count_tokens_and_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    for alive, single, total in ((576, 300, 309), (309, 200, 204), (204, 110, 113), (55, 26, 27)):
        tokens = torch.randn(1, alive, 4, generator=generator)
        answers = {
            tp.Text(): question(),
            tp.Entered(): tokens,
            tp.DecoderRows("text", "previous"): torch.rand(1, 2, 2, alive, generator=generator),
        }
        view = one_row(answers, alive, total, hidden=tokens)
        weights = tp.build_strategy("sparsevlm").select(view, torch.tensor([total])).weights
        assert weights is not None
        assert weights.shape == (1, total, alive)
        # Tokens as they are first, then the means of clusters.
        alone = weights[0].amax(1) == 1
        assert alone[:single].all()
        members = int((weights[0, single:] > 0).sum())
        assert members == int(0.3 * (alive - single)) + 1


@pytest.mark.parametrize(
    ("visual", "asked", "kept"),
    [(576, 132, 132), (576, 139, 132), (576, 128, 124), (2880, 324, 324), (2880, 331, 324)],
)
def test_dart_s_shares_are_whole(visual: int, asked: int, kept: int) -> None:
    """16 tokens for each of 8 pivots, and the 4 of the image: the released 128 are 132."""
    own = torch.Generator().manual_seed(0)

    def of(*shape: int) -> tp.TokensAndText:
        return tp.TokensAndText(
            torch.randn(1, visual, *shape, generator=own), torch.randn(1, 9, *shape, generator=own)
        )

    words = torch.ones(1, 9, dtype=torch.bool)
    text = tp.TextView(torch.zeros(1, 9, 4), words, words, torch.arange(9)[None] + visual)
    answers = {tp.Text(): text, tp.DecoderKeys("previous"): of(2, 4), tp.Normed(): of(8)}
    for exact, count in ((False, kept), (True, asked)):
        strategy = tp.build_strategy("dart", exact_budget=exact)
        view = one_row(answers, visual, asked)
        assert int(strategy.select(view, torch.tensor([asked])).kept.sum()) == count


def test_sparsevlm_s_version_may_be_a_number() -> None:
    for version, text in ((2.0, "2.0"), (2, "2.0"), (1.5, "1.5"), (1, "1.0")):
        numbered = tp.build_strategy("sparsevlm", version=version)
        assert numbered == tp.build_strategy("sparsevlm", version=text)


def test_version_1_keeps_what_the_rank_says() -> None:
    """Three ranks make 40 tokens and their clusters, whatever the padding of the batch."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.rand(3, 100, generator=generator)
    paid = (torch.rand(9, 3, generator=generator) @ basis)[None, None]
    tokens = torch.randn(1, 100, 4, generator=generator)
    words = tp.TextView(  # all alike: all rate
        embeddings=torch.zeros(1, 9, 4),
        valid=torch.ones(1, 9, dtype=torch.bool),
        follows=torch.ones(1, 9, dtype=torch.bool),
        positions=torch.arange(9)[None] + 100,
    )
    answers = {
        tp.Text(): words,
        tp.Entered(): tokens,
        tp.DecoderRows("text", "previous"): paid.expand(-1, 2, -1, -1),
    }
    strategy = tp.build_strategy("sparsevlm", version="1.0")
    assert not strategy.keeps_exactly
    for keep, expected in ((99, 40 + 2), (30, 30), (100, 100)):
        selection = strategy.select(
            one_row(answers, 100, keep, hidden=tokens), torch.tensor([keep])
        )
        assert int(selection.kept.sum()) == expected


def test_version_2_refuses_prompts_that_its_divisor_does_not_reach() -> None:
    strategy = tp.build_strategy("sparsevlm", version="2.0")
    for number, fits in ((1704, True), (1705, False)):
        answers = {
            tp.Text(): question(length=number),
            tp.Entered(): torch.zeros(1, number, 4),
            tp.DecoderRows("text", "previous"): torch.rand(1, 1, 2, number),
        }
        view = one_row(answers, number, 9)
        if fits:
            assert len(kept(strategy, view, 9)) == 9
            continue
        with pytest.raises(ValueError, match=r"at most 1706 tokens for version 2.0, .* got 1707"):
            kept(strategy, view, 9)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sparsevlm", {"version": "3.0"}, r"SparseVLM.version: expected one of \['1.0', '1.5',"),
        ("sparsevlm", {"scale": -1.0}, r"SparseVLM.scale, bias: .* got -1.0 and 0.0"),
        ("dart", {"image_pivots": 0}, "DART.image_pivots: expected an integer >= 1, got 0"),
        ("dart", {"text_pivots": "4"}, "DART.text_pivots: expected an integer >= 1, got '4'"),
        ("priortr", {"queries": "all"}, "PriorTR.queries: expected one of"),
        ("vidcom2", {"channels": 1.5}, "VidCom2.channels: expected a fraction"),
        ("vidcom2", {"channels": -0.1}, "VidCom2.channels: expected a fraction"),
        ("vidcom2", {"temperature": 0}, "VidCom2.temperature: expected a number above 0"),
        ("vidcom2", {"temperature": -1.0}, "VidCom2.temperature: expected a number above 0"),
    ],
)
def test_fields_that_cannot_be(name: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tp.build_strategy(name, **fields)
