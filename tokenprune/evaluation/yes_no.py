"""Questions whose answer is yes or no, and what POPE and MME make of many of them.

As lmms-eval computes both: an answer is compared by rules of each, and the summary of a run is more
than the share of right answers.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]


def pope(prediction: str, accepted: Sequence[str]) -> float:
    """1 if it is the very word, yes or no; case and surrounding spaces do not count.

    Li et al., 2023, arXiv 2305.10355. "Yes." is neither: lmms-eval counts so.
    """
    return float(_word(prediction) in map(_word, accepted))


def mme(prediction: str, accepted: Sequence[str]) -> float:
    """1 if it says the right one of yes and no, in its first four characters at the latest.

    Fu et al., 2023, arXiv 2306.13394. Points do not count, and a single y or n is enough.
    """
    return float(_said(prediction) in map(_said, accepted))


def _word(text: str) -> str:
    return text.lower().strip()


def _said(text: str) -> str:
    bare = _word(text).replace(".", "")
    if len(bare) == 1:
        return {"y": "yes", "n": "no"}.get(bare, bare)
    for word in ("yes", "no"):
        if word in bare[:4]:
            return word
    return bare


def pope_summary(records: Records) -> dict[str, float]:
    """Precision, recall and F1 of yes, and the share of answers that are yes; 0 where none is.

    A question that is answered by neither word is no answer of yes, and none of no that is missed.
    """
    pairs = [(_word(record["prediction"]), _word(record["answer"])) for record in records]
    true = pairs.count(("yes", "yes"))
    said = sum(own == "yes" and right in ("yes", "no") for own, right in pairs)
    there = true + pairs.count(("no", "yes"))
    precision, recall = true / said if said else 0.0, true / there if there else 0.0
    total = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
        "yes": sum(own == "yes" for own, _ in pairs) / len(pairs),
    }


#: MME's kinds of questions, of which it prints two sums: 2000 and 800 at best.
_PARTS = {
    "perception": "existence count position color posters celebrity scene landmark artwork ocr",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}


def mme_summary(records: Records) -> dict[str, float]:
    """MME's score of each kind, of 200: accuracy in percent, and that of pairs.

    A pair counts where both of its questions are right. Questions of a kind whose rows share an id
    are a pair, as MME's do; those with an id of their own are paired by their picture. Where more
    than two belong together, they are paired two by two in their order. A question that is left
    alone counts for nothing but `unpaired`.

    Args:
        records: Also with `picture`, which is the same for questions about the same image.

    Returns:
        Where kinds are MME's, also what it prints: the sums of `perception` and of `cognition`.
    """
    kinds: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    # A data set calls rows that share an id `x`, `x#2`, `x#3`.
    ids = [(record["kind"], re.sub(r"#\d+$", "", str(record["id"]))) for record in records]
    shared = Counter(ids)
    for record, own in zip(records, ids, strict=True):
        key = ("id", own[1]) if shared[own] > 1 else ("picture", record["picture"])
        kinds[record["kind"]][key].append(record["score"])
    found, unpaired = {}, 0
    for kind, groups in sorted(kinds.items()):
        pairs = [
            scores[start : start + 2]
            for scores in groups.values()
            for start in range(0, len(scores) - 1, 2)
        ]
        unpaired += sum(len(scores) % 2 for scores in groups.values())
        if pairs:
            single = statistics.fmean(sum(scores) / 2 for scores in pairs)
            both = statistics.fmean(float(sum(scores) == 2) for scores in pairs)
            found[kind] = 100 * (single + both)
    sums = {}
    for part, names in _PARTS.items():
        own_kinds = [score for kind, score in found.items() if kind.lower() in names.split()]
        if own_kinds:
            sums[part] = sum(own_kinds)
    return found | sums | {"unpaired": unpaired}
