"""Each method once more, plain and slow: loops over tokens in float64, one row at a time.

Written from the papers' rules as the strategies' docstrings have them, to be compared with.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
from made_views import Made

import tokenprune as tp
from tokenprune.strategy import HasPatches

#: Survivors of a row, and of each, in their order, how it is mixed; None where none is.
Row = tuple[list[int], "list[dict[int, Fraction]] | None"]
#: The least and the most that a token's score may be, where rounding decides between them.
Range = tuple[float, float]


def rows(made: Made, answer: object) -> list[np.ndarray]:
    """Of each batch row what exists, in float64."""
    array = answer.double().numpy()  # type: ignore[attr-defined]
    return [array[row] for row in range(len(made.counts))]


def best(scores: list[float], among: list[int], number: int) -> list[int]:
    """The highest-scoring of some tokens, the highest first; the lower index wins ties."""
    return sorted(among, key=lambda i: (-scores[i], i))[: max(0, number)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a), 1e-12) / max(np.linalg.norm(b), 1e-12))


# -------------------------------------------------------------------------------------------- joint


def divprune(made: Made, row: int, again: bool = False) -> Row:
    tokens = rows(made, made.answers[tp.Projected()])[row][: made.counts[row]]
    number = len(tokens)
    if int(made.keep[row]) >= number:
        return list(range(number)), None
    distance = [[1 - cosine(a, b) for b in tokens] for a in tokens]
    for i in range(number):
        distance[i][i] = 0.0
    picked: list[int] = []
    for _ in range(min(int(made.keep[row]), number)):
        if not picked:
            alone = number == 1
            reach = [math.inf if alone else round(sorted(d)[1], 12) for d in distance]
        else:
            reach = [round(min(distance[i][j] for j in picked), 12) for i in range(number)]
        among = [i for i in range(number) if again or i not in picked]
        picked += best(reach, among, 1)
    return sorted(set(picked)), None


def cdpruner(made: Made, row: int) -> Row:
    tokens = rows(made, made.answers[tp.Projected()])[row][: made.counts[row]]
    text = made.answers[tp.Text()]
    words = rows(made, text.embeddings)[row]
    asks = text.follows[row] if text.follows[row].any() else text.valid[row]
    words = [word for word, asked in zip(words, asks.tolist(), strict=True) if asked]
    mean = [sum(cosine(token, word) for word in words) / max(1, len(words)) for token in tokens]
    return determinants(made, row, scaled(mean))


def cdpruner_clip(made: Made, row: int, clip: Any, pieces: list[np.ndarray]) -> Row:
    """By CLIP: its own norm and projection of the tower's states, and a question's pieces."""
    norm = clip.vision_model.post_layernorm
    weight, bias, project = (
        part.detach().double().numpy()
        for part in (norm.weight, norm.bias, clip.visual_projection.weight)
    )
    states = rows(made, made.answers[tp.VisionStates(-2, "hidden")])[row][: made.counts[row]]
    has_patch = made.answers[HasPatches()][row].tolist()  # type: ignore[index]
    like = []
    for state, exists in zip(states, has_patch, strict=False):
        apart = state - state.mean()
        patch = project @ (apart / math.sqrt(float((apart**2).mean()) + norm.eps) * weight + bias)
        if exists:
            like.append(-sum(cosine(patch, piece) for piece in pieces) / len(pieces))
    known = iter(scaled(like))
    relevance = [next(known) if has_patch[i] else 1e-6 for i in range(len(states))]
    return determinants(made, row, relevance)


def scaled(like: list[float]) -> list[float]:
    low, high = (min(like), max(like)) if like else (0.0, 0.0)
    return [(own - low + 1e-6) / max(high - low, 1e-6) for own in like]


def determinants(made: Made, row: int, relevance: list[float]) -> Row:
    """Greedily what adds most to the determinant of the kernel of those picked."""
    tokens = rows(made, made.answers[tp.Projected()])[row][: made.counts[row]]
    number = len(tokens)
    picked: list[int] = []
    for _ in range(min(int(made.keep[row]), number)):
        # What the span of those picked leaves of a token, by least squares.
        span = np.stack([tokens[i] for i in picked]).T if picked else np.zeros((tokens.shape[1], 1))
        gains = []
        for i in range(number):
            unit = tokens[i] / np.linalg.norm(tokens[i])
            own = unit - span @ np.linalg.lstsq(span, unit, rcond=1e-9)[0]
            left = float(own @ own)
            gains.append(relevance[i] ** 2 * (left if left >= 2e-4 else 0.0))
        picked += best(
            [round(g, 15) for g in gains], [i for i in range(number) if i not in picked], 1
        )
    return sorted(picked), None


def dart(made: Made, row: int, exact: bool = False) -> Row:
    number, text = made.counts[row], made.answers[tp.Text()]
    keep = min(int(made.keep[row]), number)
    if keep == number:
        return list(range(number)), None
    keys, states = made.answers[tp.DecoderKeys("previous")], made.answers[tp.Normed()]
    norms = [float(np.abs(key).sum()) for key in rows(made, keys.visual)[row]]
    text_norms = [float(np.abs(key).sum()) for key in rows(made, keys.text)[row]]
    following = text.follows[row].nonzero()[:, 0].tolist()
    own = best(norms, list(range(number)), min(4, keep))
    asking = best(text_norms, following, 4)
    hidden, text_hidden = rows(made, states.visual)[row], rows(made, states.text)[row]
    pivots = [hidden[i] for i in own] + [text_hidden[i] for i in asking]
    kept, rest = set(own), keep - len(own)
    for turn, pivot in enumerate(pivots):
        share = rest // len(pivots) + (exact and turn < rest % len(pivots))
        unlike = [round(-cosine(pivot, hidden[i]), 12) for i in range(number)]
        kept |= set(best(unlike, [i for i in range(number) if i not in kept], share))
    return sorted(kept), None


# -------------------------------------------------------------------------------------- SparseVLM


def sparsevlm_raters(made: Made, row: int) -> list[int]:
    text = made.answers[tp.Text()]
    following = text.follows[row].nonzero()[:, 0].tolist()
    image = rows(made, made.answers[tp.Entered()])[row][: made.original[row]]
    words = rows(made, text.embeddings)[row]
    rates = dict.fromkeys(following, 0.0)
    for token in image:
        weights = {word: math.exp(float(token @ words[word])) for word in following}
        for word in following:
            rates[word] += weights[word] / sum(weights.values()) / len(image)
    mean = sum(rates.values()) / max(1, len(rates))
    return [word for word in following if rates[word] > mean + 1e-12] or following


def sparsevlm_scores(made: Made, row: int, version: str = "1.5") -> list[float]:
    text, number = made.answers[tp.Text()], made.counts[row]
    raters = sparsevlm_raters(made, row)
    attention = rows(made, made.answers[tp.DecoderRows("text", "previous")])[row]
    attention = attention[:, raters, :number]
    heads = range(attention.shape[0])
    if version == "2.0":
        pairs = np.arange(64)
        for place, rater in enumerate(raters):
            for token in range(number):
                apart = int(text.positions[row, rater]) - token
                bias = 2 / math.sqrt(128) * np.cos(apart * 10_000.0 ** (-2 * pairs / 128)).sum()
                attention[:, place, token] /= bias
        heads = best([float(a.sum()) for a in attention], list(heads), 14)
    return [
        float(sum(attention[h, r, i] for h in heads for r in range(len(raters))))
        / max(1, len(heads) * len(raters))
        for i in range(number)
    ]


def sparsevlm_1(made: Made, row: int, scale: float = 13.5, bias: float = 0.0) -> Row:
    """How many stay follows the rank of what raters pay; the budget is an upper bound."""
    number = made.counts[row]
    raters = sparsevlm_raters(made, row)
    attention = made.answers[tp.DecoderRows("text", "previous")][row].numpy()  # type: ignore[index]
    paid = attention.mean(0)[raters, :number]
    rank = 0
    if paid.size:
        lengths = np.linalg.svd(paid, compute_uv=False)
        tolerance = lengths.max() * max(paid.shape) * np.finfo(np.float32).eps
        rank = int((lengths > tolerance).sum())
    single = min(int(scale * rank + bias), number - 1)
    return sparsevlm(made, row, max(0, single))


def sparsevlm_2(made: Made, row: int) -> Row:
    scores = [round(s, 12) for s in sparsevlm_scores(made, row, "2.0")]
    return sorted(best(scores, list(range(len(scores))), int(made.keep[row]))), None


def sparsevlm(made: Made, row: int, most: int | None = None) -> Row:
    number = made.counts[row]
    total = min(int(made.keep[row]), number)
    if total == number if most is None else int(made.keep[row]) >= made.original[row]:
        return list(range(number)), [{i: Fraction(1)} for i in range(number)]
    scores = [round(s, 12) for s in sparsevlm_scores(made, row)]

    def in_all(single: int) -> int:
        return single + int((int(0.3 * (number - single)) + 1) / 10) + 1

    single = max([s for s in range(number) if in_all(s) <= total], default=0)
    if most is not None:
        single = min(single, most)
        total = min(total, in_all(single))
    num_clusters = total - single
    kept = sorted(best(scores, list(range(number)), single))
    dropped = [i for i in range(number) if i not in kept]
    members = sorted(best(scores, dropped, int(0.3 * len(dropped)) + 1))
    hidden = made.view.hidden[row].double().numpy()
    clusters = density_peaks([hidden[i] for i in members], num_clusters)
    mixes = [{i: Fraction(1)} for i in kept]
    mixes += [{members[i]: Fraction(1, len(cluster)) for i in cluster} for cluster in clusters]
    seats = sorted(kept + dropped[len(dropped) - num_clusters :])
    return seats, mixes


def density_peaks(points: list[np.ndarray], number: int) -> list[list[int]]:
    """Clusters of points, by descending score of their centres."""
    if number == 0:
        return []
    every = range(len(points))
    apart = [[float(np.linalg.norm(a - b)) / math.sqrt(len(a)) for b in points] for a in points]
    density = [
        round(math.exp(-sum(d**2 for d in sorted(row)[:number]) / number), 12) for row in apart
    ]
    largest = max(map(max, apart))
    delta = [
        min((apart[i][j] for j in every if density[j] > density[i]), default=largest) for i in every
    ]
    centres = best([round(density[i] * delta[i], 12) for i in every], list(every), number)
    clusters: list[list[int]] = [[] for _ in centres]
    for i in every:
        if i in centres:
            clusters[centres.index(i)].append(i)
        else:
            distances = [round(apart[i][centre], 12) for centre in centres]
            clusters[distances.index(min(distances))].append(i)
    return clusters


# ----------------------------------------------------------------------------------------- PruMerge


def outliers(
    tiles: list[list[int]], scores: list[float], spread: bool
) -> list[tuple[list[int], list[int]]]:
    """Of each tile the tokens that outliers make room for, the highest first, and the even ones."""
    every = [scores[token] for tile in tiles for token in tile]
    if not every:
        return []
    low, high = np.quantile(np.array(every, dtype=np.float32), [0.25, 0.75])
    number = sum(score > high + 1.5 * (high - low) for score in every)
    found = []
    for tile in tiles:
        order = sorted(tile, key=lambda token: (-scores[token], token))
        first = order[: len(tile) * number // len(every)]
        stride = max(1, len(every) // number // 3) if number else len(tile)
        places = range(0, len(tile) - 1, stride) if spread else []
        found.append((first, [tile[place] for place in places if tile[place] not in first]))
    return found


# ------------------------------------------------------------------------------------------ pooling


def pool(made: Made, row: int) -> Row:
    places = made.view.places[row, : made.counts[row]].tolist()
    units = grids(places)
    mixes: dict[int, dict[int, Fraction]] = {}
    for unit, quota in zip(units, shares(list(map(len, units)), int(made.keep[row])), strict=True):
        order = unit
        if places[unit[0]][2] >= 0:
            lines = max(places[i][2] for i in unit) + 1
            columns = max(places[i][3] for i in unit) + 1
            bands = max(1, round(math.sqrt(quota * lines / columns)))

            def along(i: int, bands: int = bands, lines: int = lines) -> tuple[int, int, int]:
                band = places[i][2] * bands // lines
                return band, places[i][3] * (-1) ** band, places[i][2]

            order = sorted(unit, key=along)
        groups: dict[int, list[int]] = {}
        for step, i in enumerate(order):
            if quota:
                groups.setdefault(step * quota // len(order), []).append(i)
        for group in groups.values():
            mixes[min(group)] = dict.fromkeys(group, Fraction(1, len(group)))
    seats = sorted(mixes)
    return seats, [mixes[seat] for seat in seats]


def grids(places: list[list[int]]) -> list[list[int]]:
    """Tokens that stand in one grid, one after the other; those without any are alike."""
    units: list[list[int]] = []
    previous = None
    for i, (image, grid, line, _) in enumerate(places):
        unit = (image, grid) if line >= 0 else None
        if i == 0 or unit != previous:
            units.append([])
        units[-1].append(i)
        previous = unit
    return units


def shares(sizes: list[int], budget: int) -> list[int]:
    """A budget by size, the largest remainders first, the lower unit of two."""
    total = sum(sizes)
    budget = min(budget, total)
    exact = [Fraction(budget * size, max(1, total)) for size in sizes]
    given = [int(e) for e in exact]
    order = sorted(range(len(sizes)), key=lambda u: (given[u] - exact[u], u))
    for unit in order[: budget - sum(given)]:
        given[unit] += 1
    return given


def vtw(made: Made, row: int) -> Row:
    return list(range(min(int(made.keep[row]), made.counts[row]))), None


# ----------------------------------------------------------------------------------- what is scored


def highest(made: Made, row: int, scores: list[float]) -> Row:
    return sorted(best(scores, list(range(len(scores))), int(made.keep[row]))), None


def v2drop(made: Made, row: int) -> Row:
    changes = rows(made, made.answers[tp.Change()])[row][: made.counts[row]]
    return highest(made, row, [math.sqrt(sum(x * x for x in own)) for own in changes.tolist()])


def evs(made: Made, row: int, images: bool = False) -> Row:
    videos = made.answers[tp.Videos()][row].tolist()  # type: ignore[index]
    tokens = rows(made, made.answers[tp.Projected()])[row][: made.counts[row]]
    places = made.view.places[row, : made.counts[row]].tolist()
    scores = []
    for i, (image, frame, line, column) in enumerate(places):
        before = [image, frame - 1, line, column]
        known = min(places[i]) >= 0 and frame > 0 and videos[i]
        if images:
            before, known = [image - 1, frame, line, column], min(places[i]) >= 0
        if known and before in places:
            scores.append(1 - cosine(tokens[i], tokens[places.index(before)]))
        else:
            scores.append(255.0)
    return highest(made, row, scores)


def priortr(made: Made, row: int, queries: str = "text") -> list[list[Range]]:
    """Scores, each what it is."""
    number = made.counts[row]
    follows = made.answers[tp.Text()].follows[row].nonzero()[:, 0].tolist()
    attention = rows(made, made.answers[tp.DecoderRows("text", "previous")])[row]
    asked = []
    for word in follows:
        asked.append([sum(head[word, i] for head in attention) / len(attention)
                      for i in range(number)])  # fmt: skip
    if not asked:
        return [[(0.0, 0.0)] * number]
    prior, task = asked[0], asked[-1]
    if queries == "text":
        task = [sum(own[i] for own in asked) / len(asked) for i in range(number)]
    prior = [own / (sum(prior) + 1e-10) for own in prior]
    task = [own / (sum(task) + 1e-10) for own in task]
    scores = [
        own * math.log((own + 1e-10) / (before + 1e-10))
        for own, before in zip(task, prior, strict=True)
    ]
    return [[(score, score) for score in scores]]


def vidcom2(
    made: Made, row: int, channels: float = 0.5, temperature: float = 0.01
) -> list[list[Range]]:
    """Scores by each choice of channels that vary alike, but for rounding."""
    tokens = rows(made, made.answers[tp.Projected()])[row][: made.counts[row]]
    if not len(tokens):
        return [[]]
    places = made.view.places[row, : made.counts[row]].tolist()
    gridded = {place[0] for place in places if place[2] >= 0}
    placed = [i for i, p in enumerate(places) if p[2] >= 0 or p[0] not in gridded]
    tokens, count = tokens[placed], len(tokens)
    vary = []
    for channel in tokens.T.tolist():
        mean = sum(channel) / len(channel)
        vary.append(sum((x - mean) ** 2 for x in channel) / len(channel))
    every = list(range(len(vary)))
    number = int(channels * len(vary))
    last = sorted(vary)[number - 1] if number else -1.0
    sure = [c for c in every if vary[c] < last - 1e-6]
    alike = [c for c in every if abs(vary[c] - last) <= 1e-6]
    frames = [[placed.index(i) for i in frame if i in placed] for frame in grids(places)]
    found = []
    for chosen in itertools.combinations(alike, number - len(sure)):
        own = tokens[:, sorted([*sure, *chosen])].tolist()
        scores = vidcom2_scores(own, [frame for frame in frames if frame], temperature)
        known = dict(zip(placed, scores, strict=True))
        found.append([known.get(i, (1.0, 1.0)) for i in range(count)])
    return found


def vidcom2_scores(
    tokens: list[list[float]], frames: list[list[int]], temperature: float
) -> list[Range]:
    def mean(of: list[list[float]]) -> list[float]:
        return [sum(channel) / len(of) for channel in zip(*of, strict=True)]

    def closeness(a: list[float], b: list[float]) -> float:
        square = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
        return sum(math.exp(-square / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    units = []
    for token in tokens:
        length = math.sqrt(sum(x * x for x in token))
        units.append([x / length if length else 0.0 for x in token])
    center = mean(units)
    of_video = [closeness(unit, center) for unit in units]
    unique = [-sum(of_video[i] for i in frame) / len(frame) for frame in frames]
    weights = [math.exp((own - max(unique)) / temperature) for own in unique]
    scores: list[Range] = [(0.0, 0.0)] * len(units)
    for frame, weight in zip(frames, weights, strict=True):
        share = len(frame) * (1 + weight / sum(weights) - 1 / len(frames))
        center = mean([units[i] for i in frame])
        close = {i: of_video[i] + closeness(units[i], center) for i in frame}
        for i in frame:
            first = sum(close[j] < close[i] - 1e-5 for j in frame)
            last = sum(close[j] <= close[i] + 1e-5 for j in frame) - 1
            scores[i] = (-(last + 0.5) / share, -(first + 0.5) / share)
    return scores
