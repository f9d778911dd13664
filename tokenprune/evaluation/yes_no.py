"""Questions whose answer is yes or no, and what POPE and MME make of many of them.

As lmms-eval computes both: an answer is compared by rules of each, and the summary of a run is more
than the share of right answers.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
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


def mme_summary(records: Records) -> dict[str, float]:
    """MME's score of each kind, of 200, and their sum: accuracy in percent, and that of pairs.

    Both questions about an image make a pair, which counts where both are right. Images with
    another number of questions are left out, and counted as `unpaired`.

    Args:
        records: Also with `picture`, which is the same for questions about the same image.
    """
    kinds: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        kinds[record["kind"]][record["picture"]].append(record["score"])
    found, unpaired = {}, 0
    for kind, images in sorted(kinds.items()):
        pairs = [scores for scores in images.values() if len(scores) == 2]
        unpaired += len(images) - len(pairs)
        if pairs:
            single = statistics.fmean(sum(scores) / 2 for scores in pairs)
            both = statistics.fmean(float(sum(scores) == 2) for scores in pairs)
            found[kind] = 100 * (single + both)
    return found | {"total": sum(found.values()), "unpaired": unpaired}
