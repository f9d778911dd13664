"""A pruned model as lmms-eval wants one: its tasks ask, this answers and notes what it cost.

Needs the package lmms-eval, which nothing else here imports.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

import tokenprune as tp
from tokenprune.data.collate import IGNORED, ConversationCollator, PromptCollator
from tokenprune.data.sample import Sample
from tokenprune.evaluation.answering import answer, costs
from tokenprune.evaluation.generation import now, pruned
from tokenprune.evaluation.kept import kept_tokens
from tokenprune.evaluation.requests import cut, from_messages, from_text, options
from tokenprune.evaluation.shares import Notes
from tokenprune.evaluation.sizes import pixels
from tokenprune.evaluation.summary import cost_of
from tokenprune.runs import launchers
from tokenprune.runs.compose import Pruning, called
from tokenprune.runs.models import LoadedModel

Key = tuple[str, int]
#: What of a record says what a request cost.
_COSTS = ("num_visual", "given", "visual")


@dataclass(frozen=True)
class _Asked:
    """A request, before its document is read: the images of a benchmark need not fit into memory.

    Attributes:
        key: Its task, and the number of its document.
        given: Options of `generate`.
        size: Pixels of its images and characters of its text.
        read: Makes its sample.
        before: Requests about the same document before it.
    """

    key: Key
    given: Mapping[str, Any]
    size: tuple[int, int]
    read: Callable[[], Sample]
    before: int = 0

    def mark(self, sample: Sample) -> str:
        """What notes know it by: whatever decides about its answer but the run's config.

        Args:
            sample: Its own.
        """
        turns = [(turn.system, turn.question, turn.answer) for turn in sample.turns]
        content = json.dumps([self.key, self.before, self.given, turns, sample.mark], default=str)
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


class NotPruned(ValueError):
    """Pruning was asked for, and no token of any image was pruned."""


class Harness(lmms):  # type: ignore[misc]
    """Answers requests of lmms-eval's simple tasks under pruning.

    Args:
        loaded: Model and processor.
        pruning: Strategy, schedule and positions; None for the unpruned model.
        batch_size: Questions that are answered at once.
        device: Where the model goes; None leaves it, but for several processes on one machine,
            each of which takes a GPU of its own.
        num_pictures: First so many requests whose kept tokens are noted.
        image_scale: Share of the images' pixels that the model is given, see `PromptCollator`.
        notes: Where answers are noted as they come; what stands there is not asked again.
        warn: Told, once, what the tasks ask for and do not get.
    """

    is_simple = True

    def __init__(
        self,
        loaded: LoadedModel,
        pruning: Pruning | None,
        batch_size: int = 1,
        device: str | None = None,
        num_pictures: int = 0,
        image_scale: float = 1.0,
        notes: Notes | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        super().__init__()
        self.loaded, self.pruning = loaded, pruning
        self.batch_size = int(batch_size)
        self.num_pictures = num_pictures
        self.shape = tp.cost.DecoderShape.from_config(loaded.model.config)
        #: What each request cost, by task and number of the document.
        self.records: dict[Key, dict[str, Any]] = {}
        # Of answers of this process, and of those that were noted before: see `times`.
        self._measured: list[float] = []
        self._noted: list[float] = []
        self._spent: list[float] = [0.0, 0]
        self._pictured: set[Key] = set()
        self._warn, self._notes = cache(warn), notes
        self.image_scale = image_scale
        self._prompts = PromptCollator(loaded.processor, image_scale)
        self._begin(device)

    def _begin(self, device: str | None) -> None:
        """Takes this process's place among those that a launcher has started."""
        model: Any = self.loaded.model
        if launchers.num_processes() > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            device = str(self.accelerator.device)
        if device is not None and getattr(model, "hf_device_map", None) is None:
            model.to(device)

    @property
    def times(self) -> list[float]:
        """Prefill time per question, one entry per batch; what is noted, if none was asked."""
        return self._measured or self._noted

    @property
    def device(self) -> torch.device:
        """Where inputs go; lmms-eval asks, too."""
        return self.loaded.model.device

    # ------------------------------------------------------------------------------------ answers

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            ValueError: A request is none of text and images, or pruning was asked for and no
                token of any image was pruned.
        """
        asked = _numbered(self._asked(request) for request in requests)
        texts = self._begin_with(asked)
        left = [number for number in range(len(asked)) if number not in texts]
        tokenizer = self.loaded.processor.tokenizer
        seconds, num_tokens = 0.0, 0
        for given, numbers in _grouped(left, lambda n: json.dumps(asked[n].given, sort_keys=True)):
            tasks = ", ".join(sorted({asked[number].key[0] for number in numbers}))
            longest, until, taken = options(json.loads(given), partial(self._tell, tasks))
            for batch in _batches(numbers, self.batch_size, asked):
                samples = [asked[number].read() for number in batch]
                prompts = self._prompts(samples)
                start = now(self.device)
                answers = answer(
                    self.loaded,
                    self.pruning,
                    self._to_device(prompts["inputs"]),
                    longest,
                    whole_ids=prompts.get("whole_ids"),
                    **taken,
                )
                seconds += now(self.device) - start
                told = tokenizer(answers.texts, add_special_tokens=False)["input_ids"]
                num_tokens += sum(map(len, told))
                self._measured.append(answers.seconds / len(batch))
                for row, number in enumerate(batch):
                    texts[number] = cut(answers.texts[row], until)
                    cost = answers.costs[row]
                    own = answers.rows[row]
                    self._note(asked[number].key, samples[row], cost, answers.trace, own)
                if not taken["do_sample"]:  # what chance says depends on what it has said
                    mine, said = ([own[number] for number in batch] for own in (asked, texts))
                    self._keep(mine, samples, said, self._measured[-1])
        self._finish(len(asked), seconds, num_tokens)
        return [texts[number] for number in range(len(asked))]

    def _begin_with(self, asked: Sequence[_Asked]) -> dict[int, Any]:
        """What was answered to those of the requests that are noted, by their places.

        Raises:
            ValueError: The first question of a task is none that can be asked: its media are
                others than images, or its chat template takes no system message.
        """
        for own in {own.key[0]: own for own in reversed(asked)}.values():
            self._prompts.text(own.read())
        for own in asked:  # in their order, whichever is answered first
            if len(self._pictured) >= self.num_pictures:
                break
            if own.read().images:
                self._pictured.add(own.key)
        if self._notes is None or not self._notes.exist():
            return {}
        self._notes.mend(self.rank, self.world_size)
        noted, times = self._notes.answers()
        found: dict[int, Any] = {}
        for number, own in enumerate(asked):
            sample = own.read()
            note = noted.get(own.mark(sample))
            if note is None or (own.key in self._pictured and "kept" not in note["record"]):
                continue
            found[number] = note["told"]
            record = self.records.setdefault(own.key, note["record"])
            if "kept" in record:
                record["image"] = sample.image
        self._noted = times
        if found:
            self._warn(f"{len(found)} of {len(asked)} answers are there already")
        return found

    def _keep(
        self,
        asked: Sequence[_Asked],
        samples: Sequence[Sample],
        told: Sequence[Any],
        seconds: float | None = None,
    ) -> None:
        """Notes what was answered to a batch, and its prefill time per question."""
        if self._notes is None:
            return
        records = []
        for own, answered in zip(asked, told, strict=True):
            record = {name: v for name, v in self.records[own.key].items() if name != "image"}
            records.append({"told": answered, "record": record})
        marks = [own.mark(sample) for own, sample in zip(asked, samples, strict=True)]
        note = {"numbers": marks, "records": records, "seconds": seconds}
        self._notes.add(self.rank, self.world_size, note)

    def _tell(self, tasks: str, text: str) -> None:
        self._warn(f"{tasks}: {text}")

    def _asked(self, request: Any) -> _Asked:
        context, given, to_visual, number, task, split = request.args

        def read(document: Any) -> Sample:
            return from_text(f"{task} {number}", context, to_visual(document))

        return self._later(task, split, number, context, given, read)

    def _later(
        self,
        task: str,
        split: str,
        number: int,
        text: str,
        given: Mapping[str, Any],
        read: Callable[[Any], Sample],
    ) -> _Asked:
        """A request whose document is read when its batch comes, and no earlier."""
        documents = self.task_dict[task][split]
        size = pixels(documents, number), len(text)
        return _Asked((task, number), given, size, lambda: read(documents[number]))

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Of each continuation: what lmms-eval ranks by, and whether greedy decoding says it.

        That is the mean negative log-likelihood of its tokens, in nats: lmms-eval takes the lowest.
        What follows the continuation, such as an end of turn, does not count, unless the
        continuation has no tokens but special ones. The prompt is pruned as it is before an answer
        is generated.

        Returns:
            Pairs of the two, as `text` of lmms-eval's type for answers: of any other type than
            that and texts it makes a text.
        """
        collate = ConversationCollator(self.loaded.processor, self.image_scale)
        asked = _numbered(self._continued(request) for request in requests)
        # Of each: question, continuation, how unlikely it is, whether greedy decoding says it.
        found = self._begin_with(asked)
        left = [number for number in range(len(asked)) if number not in found]
        seconds = 0.0
        for batch in _batches(left, self.batch_size, asked):
            samples = [asked[number].read() for number in batch]
            inputs = self._to_device(collate(samples)["inputs"])
            whole = None if self.image_scale == 1 else self._prompts(samples)["whole_ids"]
            start = now(self.device)
            told = list(self._likelihoods(inputs, whole))
            seconds += now(self.device) - start
            for row, (loss, greedy, cost, trace) in enumerate(told):
                number, turn = batch[row], samples[row].turns[0]
                found[number] = turn.question, turn.answer, loss, greedy
                self._note(asked[number].key, samples[row], cost, trace, row)
            self._keep([asked[number] for number in batch], samples, [found[n] for n in batch])
        for number, own in enumerate(asked):
            self.records[own.key].setdefault("ranked", []).append(tuple(found[number][:3]))
        self._finish(len(asked), seconds, 0)
        return [GenerationResult(tuple(found[n][2:]), None) for n in range(len(asked))]

    def _continued(self, request: Any) -> _Asked:
        if len(request.args) == 2:
            raise NotImplementedError(
                "lmms-eval: expected a task that asks about images, got one by mutual information. "
                "Choose a metric other than acc_mutual_info."
            )
        context, target, to_visual, number, task, split = request.args

        def read(document: Any) -> Sample:
            text = str(target(document) if callable(target) else target).strip()
            sample = from_text(f"{task} {number}", context, to_visual(document))
            return replace(sample, turns=(replace(sample.turns[0], answer=text),))

        text = context if callable(target) else context + str(target)
        return self._later(task, split, number, text, {}, read)

    @torch.no_grad()
    def _likelihoods(
        self, inputs: Mapping[str, Any], whole_ids: torch.Tensor | None
    ) -> Iterator[tuple[float, bool, dict[str, Any], tp.Trace | None]]:
        """Rows of a batch padded on the right, with `labels` on the continuations, (B, T)."""
        model: Any = self.loaded.model
        labels = _of_continuations(inputs["labels"], self.loaded.processor.tokenizer)
        with pruned(self.loaded, self.pruning, logits="full") as trace:
            logits = model(**dict(inputs) | {"labels": labels}).logits  # (B, T, vocabulary)
        for row, cost in enumerate(costs(self.loaded, inputs, trace, whole_ids)):
            (places,) = (labels[row] != IGNORED).nonzero(as_tuple=True)
            said = labels[row, places]
            told = logits[row, places - 1].float().log_softmax(-1)
            loss = -told.gather(-1, said[:, None]).mean().item()
            yield loss, bool((told.argmax(-1) == said).all()), cost, trace

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "lmms-eval: expected tasks of one question each, got one of several rounds. Choose "
            "another task."
        )

    # -------------------------------------------------------------------------------------- costs

    def _to_device(self, inputs: Any) -> Any:
        return inputs.to(self.device, dtype=self.loaded.model.dtype)

    def _note(
        self, key: Key, sample: Sample, cost: dict[str, Any], trace: tp.Trace | None, row: int
    ) -> None:
        if key in self.records:  # by another of its options
            return
        record = cost | {"question": sample.turns[-1].question, "picture": sample.mark}
        if key in self._pictured:
            record |= {"kept": kept_tokens(trace, row, cost["given"]), "image": sample.image}
        self.records[key] = record

    def _finish(self, num_asked: int, seconds: float, num_tokens: int) -> None:
        """Says what all requests so far have cost; of several processes at the end, see `clean`.

        Args:
            num_asked: Requests since it was said last,
            seconds: how long answering them took,
            num_tokens: and how many tokens the answers have.

        Raises:
            NotPruned: Nothing was pruned though it was asked for.
        """
        seen = [record for record in self.records.values() if record["given"]]
        asks = self.pruning is not None and any(
            stage.keep < 1 for stage in self.pruning.schedule.stages
        )
        if asks and seen and all(r["visual"][-1] == r["given"] for r in seen):
            raise NotPruned(
                "lmms-eval: expected image tokens to be pruned, got all of them kept in all "
                f"{len(seen)} requests. Lower what the schedule keeps, or set strategy=none."
            )
        if self.world_size == 1:
            self._tell_costs(
                list(self.records.values()), self.times, num_asked, seconds, num_tokens
            )
        else:
            self._spent = [a + b for a, b in zip(self._spent, (seconds, num_tokens), strict=True)]

    def clean(self) -> None:
        """What lmms-eval calls in every process when all requests are answered.

        Not every process is asked each time: some have their answers from a cache.
        """
        if self.world_size > 1 and self._spent:
            from accelerate.utils import gather_object

            costs = {key: {name: r[name] for name in _COSTS} for key, r in self.records.items()}
            parts = gather_object([(costs, self.times, self._spent)])
            records = {key: record for part, _, _ in parts for key, record in part.items()}
            times = [own for _, part, _ in parts for own in part]
            seconds = max(own[0] for _, _, own in parts)  # they answer at the same time
            num_tokens = int(sum(own[1] for _, _, own in parts))
            self._tell_costs(list(records.values()), times, len(records), seconds, num_tokens)
            self._spent = []
        super().clean()

    def _tell_costs(
        self,
        records: list[dict[str, Any]],
        times: list[float],
        num_asked: int,
        seconds: float,
        num_tokens: int,
    ) -> dict[str, Any]:
        """Tells lmms-eval what requests have cost; the same as a mapping, empty for none."""
        if not records:
            return {}
        total = cost_of(records, self.shape) | {"num_requests": len(records)}
        if times:
            total["prefill_ms"] = 1000 * statistics.median(times)
        if self.rank == 0:
            name = "none" if self.pruning is None else called(self.pruning.strategy)
            logger.info(f"tokenprune: strategy {name}, {total}")
        speed = num_tokens / seconds if seconds else 0.0
        # lmms-eval adds up what it is told of each kind of request.
        told = total | {"num_requests": num_asked}
        log_metrics(seconds, num_tokens, speed, additional_metrics=told)
        return total


class ChatHarness(Harness):
    """The same for tasks of the chat kind, which lmms-eval prefers."""

    is_simple = False

    def _asked(self, request: Any) -> _Asked:
        context, to_messages, given, number, task, split = request.args

        def read(document: Any) -> Sample:
            return from_messages(f"{task} {number}", to_messages(document))

        return self._later(task, split, number, context, given, read)


def _numbered(asked: Iterable[_Asked]) -> list[_Asked]:
    """Requests with how many about the same document came before."""
    times: Counter[Key] = Counter()
    numbered = []
    for own in asked:
        numbered.append(replace(own, before=times[own.key]))
        times[own.key] += 1
    return numbered


def _of_continuations(labels_BT: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Labels, int64 (B, T), without those of special tokens, as what ends an answer is.

    A continuation that has no other tokens, or none at all, counts with what ends it: something has
    to be likely or not.
    """
    # Some chat models' end of turn is special, but none of the named special tokens.
    added = [number for number, own in tokenizer.added_tokens_decoder.items() if own.special]
    special = torch.tensor([*tokenizer.all_special_ids, *added], device=labels_BT.device)
    own_BT = labels_BT.masked_fill(torch.isin(labels_BT, special), IGNORED)
    some_B1 = (own_BT != IGNORED).any(1, keepdim=True)
    return torch.where(some_B1, own_BT, labels_BT)


def _grouped(
    numbers: Iterable[int], key_of: Callable[[int], str]
) -> Iterator[tuple[str, list[int]]]:
    """Each key with the numbers that have it."""
    numbered = sorted((key_of(number), number) for number in numbers)
    for key, group in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield key, [number for _, number in group]


def _batches(numbers: Sequence[int], size: int, asked: Sequence[_Asked]) -> Iterator[list[int]]:
    """Numbers in batches of requests of like size, the largest first, to pad little."""
    ordered = sorted(numbers, key=lambda number: asked[number].size, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
