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
        text: What lmms-eval tells of it besides its document.
        size: Pixels of its images and characters of its text.
        read: Makes its sample.
        mark: What notes know it by.
    """

    key: Key
    given: Mapping[str, Any]
    text: str
    size: tuple[int, int]
    read: Callable[[], Sample]
    mark: str = ""


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
        #: Prefill time per question, one entry per batch.
        self.seconds: list[float] = []
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
        asked = _marked(self._asked(request) for request in requests)
        texts = self._known(asked)
        left = [number for number in range(len(asked)) if number not in texts]
        self._try_first([asked[number] for number in left])
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
                self.seconds.append(answers.seconds / len(batch))
                for row, number in enumerate(batch):
                    texts[number] = cut(answers.texts[row], until)
                    cost = answers.costs[row]
                    own = answers.rows[row]
                    self._note(asked[number].key, samples[row], cost, answers.trace, own)
                answered = [texts[number] for number in batch]
                self._keep([asked[number] for number in batch], answered, self.seconds[-1])
        self._finish(len(asked), seconds, num_tokens)
        return [texts[number] for number in range(len(asked))]

    def _try_first(self, asked: Sequence[_Asked]) -> None:
        """Refuses before any question what a task's first one shows.

        That is other media than images, and a system message that the chat template does not take.
        """
        for own in {own.key[0]: own for own in reversed(asked)}.values():
            self._prompts.text(own.read())

    def _known(self, asked: Sequence[_Asked]) -> dict[int, Any]:
        """What was answered to those of the requests that are noted, by their places.

        Of a document whose pictures are others now nothing is taken.
        """
        if self._notes is None:
            return {}
        self._notes.mend(self.rank, self.world_size)
        noted, seconds = self._notes.answers({own.mark for own in asked})
        self.seconds += [own for own in seconds if own is not None]
        found, samples = {}, dict[Key, Sample]()
        for number, own in enumerate(asked):
            if own.mark not in noted:
                continue
            record = noted[own.mark]["record"]
            if own.key not in samples:  # the last one: those of a document follow one another
                samples = {own.key: own.read()}
            if samples[own.key].mark != record["picture"]:
                continue
            found[number] = noted[own.mark]["told"]
            if "kept" in record:
                record["image"] = samples[own.key].image
            self.records.setdefault(own.key, record)
        return found

    def _keep(
        self, asked: Sequence[_Asked], told: Sequence[Any], seconds: float | None = None
    ) -> None:
        """Notes what was answered to a batch, and its prefill time per question."""
        if self._notes is None:
            return
        records = []
        for own, answered in zip(asked, told, strict=True):
            record = {name: v for name, v in self.records[own.key].items() if name != "image"}
            records.append({"told": answered, "record": record})
        marks = [own.mark for own in asked]
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
        return _Asked((task, number), given, text, size, lambda: read(documents[number]))

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
        asked = _marked(self._continued(request) for request in requests)
        # Of each: question, continuation, how unlikely it is, whether greedy decoding says it.
        found = self._known(asked)
        left = [number for number in range(len(asked)) if number not in found]
        self._try_first([asked[number] for number in left])
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
            self._keep([asked[number] for number in batch], [found[number] for number in batch])
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
        if len(self.records) < self.num_pictures and sample.images:
            record |= {"kept": kept_tokens(trace, row, cost["given"]), "image": sample.image}
        self.records[key] = record

    def _finish(self, num_asked: int, seconds: float, num_tokens: int) -> dict[str, Any]:
        """Says what all requests so far have cost, and returns it.

        Args:
            num_asked: Requests since it was said last,
            seconds: how long answering them took,
            num_tokens: and how many tokens the answers have.

        Raises:
            ValueError: Nothing was pruned though it was asked for.
        """
        records, times, asked = self._of_all((num_asked, seconds, num_tokens))
        num_asked, num_tokens = sum(own[0] for own in asked), sum(own[2] for own in asked)
        seconds = max(own[1] for own in asked)  # they answer at the same time
        seen = [record for record in records if record["given"]]
        asks = self.pruning is not None and any(
            stage.keep < 1 for stage in self.pruning.schedule.stages
        )
        if asks and seen and all(r["visual"][-1] == r["given"] for r in seen):
            raise ValueError(
                "lmms-eval: expected image tokens to be pruned, got all of them kept in all "
                f"{len(seen)} requests. Lower what the schedule keeps, or set strategy=none."
            )
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

    def _of_all(
        self, own: tuple[int, float, int]
    ) -> tuple[list[dict[str, Any]], list[float], list[tuple[int, float, int]]]:
        """Records and prefill times of all processes, and of each one what is `own` here.

        A request that two were given, so that all have as many, counts once.
        """
        if self.world_size == 1:
            return list(self.records.values()), self.seconds, [own]
        from accelerate.utils import gather_object

        costs = {key: {name: r[name] for name in _COSTS} for key, r in self.records.items()}
        records: dict[Key, dict[str, Any]] = {}
        times, every = list[float](), []
        for part, seconds, other in gather_object([(costs, self.seconds, own)]):
            records |= part
            times += seconds
            every.append(other)
        return list(records.values()), times, every


class ChatHarness(Harness):
    """The same for tasks of the chat kind, which lmms-eval prefers."""

    is_simple = False

    def _asked(self, request: Any) -> _Asked:
        context, to_messages, given, number, task, split = request.args

        def read(document: Any) -> Sample:
            return from_messages(f"{task} {number}", to_messages(document))

        return self._later(task, split, number, context, given, read)


def _marked(asked: Iterable[_Asked]) -> list[_Asked]:
    """Requests with their marks: the same for the same request of another run."""
    times: Counter[str] = Counter()
    marked = []
    for own in asked:
        told = json.dumps([own.key, own.given, own.text], sort_keys=True, default=str)
        times[told] += 1  # a document is asked about once for each of its options
        content = f"{times[told]} {told}".encode()
        marked.append(replace(own, mark=hashlib.blake2b(content, digest_size=12).hexdigest()))
    return marked


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
