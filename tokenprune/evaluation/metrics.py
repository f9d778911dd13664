"""How well an answer fits those that count as right: a score between 0 and 1.

Names as in `metric=...`. Benchmarks define their own; these are what lmms-eval computes for them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from tokenprune.evaluation import yes_no
from tokenprune.strategy import unknown_name

#: VQA asks ten people; with fewer than four answers, none of them could score 1.
_MIN_ANSWERS = 4


def exact(prediction: str, accepted: Sequence[str]) -> float:
    """1 if it is an accepted answer; case and spacing do not count."""
    return float(normalise(prediction) in map(normalise, accepted))


def normalized(prediction: str, accepted: Sequence[str]) -> float:
    """1 if it is an accepted answer; case, spacing and ASCII punctuation do not count.

    `exact_match` of lmms-eval with `ignore_case` and `ignore_punctuation`, as for GQA; it compares
    inner spaces, too.
    """
    drop = str.maketrans("", "", string.punctuation)
    own = normalise(prediction.translate(drop))
    return float(own in (normalise(answer.translate(drop)) for answer in accepted))


def vqa(prediction: str, accepted: Sequence[str]) -> float:
    """VQA's soft accuracy: what three people said is right.

    Antol et al., 2015, arXiv 1505.00468, §4, as the benchmark's code computes it: the mean of
    min(1, matches / 3) over all ways to leave out one of the answers. With ten answers, 0 to 4
    matches score 0, .3, .6, .9 and 1. TextVQA, VizWiz and VQAv2 use it.

    Raises:
        ValueError: There are fewer than four answers: none could score 1.
    """
    if len(accepted) < _MIN_ANSWERS:
        raise ValueError(
            f"metric: expected at least {_MIN_ANSWERS} answers per question for 'vqa', got "
            f"{len(accepted)} ({list(accepted)[:3]}). Set metric=exact, or name the column that "
            "lists what each person said."
        )
    own = vqa_normalise(prediction)
    same = [vqa_normalise(answer) == own for answer in accepted]
    scores = [min(1.0, (sum(same) - match) / 3) for match in same]
    return sum(scores) / len(scores)


def anls(prediction: str, accepted: Sequence[str]) -> float:
    """How near it is to an accepted answer in letters; 0 if less than half of them are right.

    Biten et al., 2019, arXiv 1905.13648, as lmms-eval computes it: 1 - edits / longer length for
    the nearest answer, case and spacing not counted among the edits, but in the lengths. Nothing is
    all right where nothing is an accepted answer.
    """
    own = normalise(prediction)
    shares = [
        1 - _edits(own, normalise(answer)) / max(len(prediction), len(answer), 1)
        for answer in accepted
    ]
    best = max(shares, default=0.0)
    return best if best >= 0.5 else 0.0


def _edits(first: str, second: str) -> int:
    """Fewest letters to insert, remove or replace (Levenshtein, 1966)."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            cost = min(row[place] + 1, row[place - 1] + 1, before + (letter != other))
            before, row[place] = row[place], cost
    return row[-1]


def relaxed(prediction: str, accepted: Sequence[str]) -> float:
    """1 if it is a number within 5 % of an accepted one, or an accepted text but for case.

    Masry et al., 2022, arXiv 2203.10244, §5.1, as lmms-eval computes it: 12% is .12, and within 5 %
    of zero there is nothing, so that zero is compared as a text.
    """
    own = prediction.strip()
    return float(any(_close(own, answer.strip()) for answer in accepted))


def _close(own: str, right: str) -> bool:
    number, target = _number(own), _number(right)
    if number is not None and target:
        return abs(number - target) / abs(target) <= _RELATIVE
    return own.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def choice(prediction: str, accepted: Sequence[str]) -> float:
    """1 if it names an accepted option by its letter.

    The first of these rules that finds a letter says which. Bold type and code marks are passed
    over, and a letter is one of A to Z that no letter, digit or apostrophe touches.

    1. Nothing else is there, in either case, but for marks around it: `B`, `b.`, `(b)`, `**B**`.
    2. It begins with a capital: `B. a car`, `B) a car`, `B is correct`.
    3. It ends with a capital: `so it is B.`
    4. Words name it, of several the last: answer, option or choice, or I choose, pick or select,
       with `is`, `:` and the like after them; a small letter only if no other word follows.
       `Answer: B because of its wheels`, `the correct option is (b).`
    5. A capital in brackets, of several the last: `it must be (B), since it has wheels`.

    In 2 and 4, A and I before another word count only if that is one of a few, such as `is`:
    `A car` and `I think` name none; in 3, I names none. lmms-eval's MMStar and MMBench look for the
    same forms in this order, but read no small letters, take any capital of a word where they find
    nothing better (`A car` and `Art` are A), and after words such as `the answer is` the last
    letter of all that follow, here the first.
    """
    own = _letter(prediction)
    return float(own is not None and own in map(_letter, accepted))


#: A capital that is an option's letter: A and I are words of their own, too.
_CAPITAL = (
    r"(?<![\w'’])(?:([B-HJ-Z])(?![\w'’])"
    r"|([AI])(?![\w'’])(?!\s+\w)|([AI])(?=\s+(?:is|was|because|since|as|and|or)\b|[^\S\n]*\n))"
)
_NAMED = re.compile(
    r"\b(?i:answer|option|choice|i\s+(?:choose|pick|select))(?:\s+(?i:is|was|would\s+be|should\s+be|"
    r"must\s+be|the|option|choice|letter|answer|correct))*\s*[:=]?\s*[(\[\"']?\s*"
    rf"(?:{_CAPITAL}|([a-z])(?=[)\]\"']?\s*(?:[.,;:!?]|$)))"
)


def _letter(text: str) -> str | None:
    bare = re.sub(r"[*`]", "", text).strip()
    marked = r"[\s(\[.,;:!?\"')\]]*"
    rules = (
        re.fullmatch(rf"{marked}([A-Za-z]){marked}", bare),
        re.match(rf"[\"']?{_CAPITAL}", bare),
        re.search(rf"(?<![\w'’])([A-HJ-Z]){marked}$", bare),
        _last(_NAMED, bare),
        _last(re.compile(r"[(\[]([A-Z])[)\]]"), bare),
    )
    found = next((rule for rule in rules if rule is not None), None)
    return None if found is None else next(own for own in found.groups() if own).upper()


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter([*pattern.finditer(text)][-1:]), None)


#: What a number may differ by, of the right one.
_RELATIVE = 0.05
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "normalized": normalized,
    "vqa": vqa,
    "anls": anls,
    "relaxed": relaxed,
    "choice": choice,
    "pope": yes_no.pope,
    "mme": yes_no.mme,
}
#: What a metric says of a whole run, beside the mean of its scores: `metric_summary` in the files.
SUMMARIES: dict[str, Callable[[yes_no.Records], dict[str, float]]] = {
    "pope": yes_no.pope_summary,
    "mme": yes_no.mme_summary,
}


def build_metric(name: str) -> Callable[[str, Sequence[str]], float]:
    """The metric of a name.

    Raises:
        KeyError: There is none.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, sorted(METRICS))
    return METRICS[name]


def normalise(text: str) -> str:
    """Case and spacing do not count in an answer."""
    return " ".join(text.lower().split())


_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"} | {
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
#: Words of the evaluation's table, which writes them so where their apostrophe is missing. It has
#: `I'm` and `I've` with a capital only, which no answer in lower case has, and not `lets`.
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
#: Those of several apostrophes, any one of which may be missing.
_TWICE_CONTRACTED = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll "
    "y'all'd've you'd've 'ow's'at"
)
_CONTRACTIONS = {text.replace("'", ""): text for text in _CONTRACTED.split()} | {
    text[:place] + text[place + 1 :]: text
    for text in _TWICE_CONTRACTED.split()
    for place, mark in enumerate(text)
    if mark == "'"
}


def vqa_normalise(text: str) -> str:
    """An answer as VQA's evaluation compares it.

    In lower case, without punctuation and articles, number words as digits, contractions with their
    apostrophes. Of the evaluation's table of contractions, `somebody'd`, which loses its own there,
    is left out.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # A mark at the edge of a word anywhere goes everywhere; others part words.
    without = text
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if at_edge else " ")
    without = re.sub(r"\.(?!\d)", "", without)  # 3.5 keeps its point
    words = [_NUMBERS.get(word, word) for word in without.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
