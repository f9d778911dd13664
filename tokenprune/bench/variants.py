"""What is compared: the unpruned model, the pruned one, and the ways of published code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenprune as tp
from tokenprune import cost
from tokenprune.bench import ways
from tokenprune.bench.clock import Clock
from tokenprune.bench.load import Load
from tokenprune.bench.theory import Theory
from tokenprune.runs.compose import Pruning
from tokenprune.strategy import decoder_rows

#: Variants that are captured as CUDA graphs, and whether they are pruned.
CAPTURED = {"unpruned_graph": False, "pruned_graph": True}


class Variant(NamedTuple):
    """One of the things compared.

    Attributes:
        context: Holds around `prepare` and `work`.
        prepare: Makes what `work` uses up; not timed.
        work: What is timed.
    """

    context: Callable[[], AbstractContextManager[Any]]
    prepare: Callable[[], Any]
    work: Callable[[Any], Any]


class Bench:
    """A model with random weights, and what can be measured on it.

    Args:
        model: From `build_model`.
        pruning: Strategy, schedule and positions.
        load: What the model is given.
        logits: Of which positions training makes logits: `all`, `supervised` or `full`.
        ways: Ways of published code to measure beside, of `ways.WAYS`.
        graph: Whether prefills are also measured as CUDA graphs.
    """

    def __init__(
        self,
        model: Any,
        pruning: Pruning,
        load: Load,
        logits: str = "all",
        ways: Sequence[str] = (),
        graph: bool = False,
    ) -> None:
        self.model, self.pruning, self.load, self.logits = model, pruning, load, logits
        self.ways = tuple(ways)
        self.graphs = tp.Graphs(2) if graph else None
        self.decoder: Any = model.get_decoder()
        self.device: torch.device = self.decoder.embed_tokens.weight.device
        self.clock = Clock(self.device)
        #: Moments before and after what the engine's hooks do, of the latest pruned run.
        self.marks: list[Any] = []
        self.shape = cost.DecoderShape.from_config(model.config)
        weight = self.decoder.embed_tokens.weight
        self.theory = Theory(self.shape, pruning.schedule, load, logits, weight.element_size())
        rows, width = load.batch_size, weight.shape[1]
        self.embeds = torch.randn(rows, load.length, width, device=self.device, dtype=weight.dtype)
        self.embeds *= 0.02  # the scale of the embeddings
        self.labels = torch.full((rows, load.length), -100, device=self.device)
        vocabulary = self.shape.vocab_size
        self.labels[:, -load.num_labels :] = torch.randint(vocabulary, (rows, load.num_labels))
        if not pruning.strategy.keeps_exactly:
            with self.pruned(marked=False) as trace:
                self.prefill()
                longest = trace.visual_lengths.amax(1)  # a batch is as long as its longest row
            self.theory = replace(self.theory, counted=tuple(longest.tolist()))

    # -- contexts --------------------------------------------------------------------------------

    @contextmanager
    def pruned(self, way: str | None = None, marked: bool = True) -> Iterator[tp.Trace]:
        """The model pruned; yields the trace.

        Args:
            way: How published code does it, one of `ways.WAYS`, in place of the product's way.
            marked: Whether `marks` gets a moment before and after each module's own hooks.
        """

        def mark(*_: Any) -> None:
            self.marks.append(self.clock.mark())

        modules: list[nn.Module] = [self.decoder, *self.decoder.layers] if marked else []
        handles = [module.register_forward_pre_hook(mark, prepend=True) for module in modules]
        own, strategy = self.pruning, self.pruning.strategy
        cuts = [stage.layer for stage in own.schedule.stages]
        rows: ways.Rows = {}
        if way in ways.SCORES:
            strategy = ways.FromRows(strategy, self.load.num_text // 2, rows)
        try:
            with tp.prune(
                self.model,
                strategy,
                own.schedule,
                own.positions,
                self.logits,
                self.load.visual_mask.to(self.device),
            ) as trace:
                handles += [module.register_forward_pre_hook(mark) for module in modules]
                with ways.WAYS[way](self.decoder.layers, cuts, rows) if way else nullcontext():
                    yield trace
        finally:
            for handle in handles:
                handle.remove()

    def captured(self, pruned: bool) -> AbstractContextManager[Any]:
        """The model with its prefills captured as CUDA graphs; unpruned there are no cuts."""
        own = self.pruning
        return tp.prune(
            self.model,
            own.strategy,
            own.schedule if pruned else tp.Schedule(),
            own.positions,
            visual_mask=self.load.visual_mask.to(self.device),
            graphs=self.graphs,
        )

    def check_graphs(self, calls: int) -> None:
        """Refuses figures of captured prefills that were none.

        Args:
            calls: Of each variant, the untimed ones, too.

        Raises:
            ValueError: If they ran as without graphs.
        """
        if self.graphs is not None and self.graphs.replays < len(CAPTURED) * (calls - 1):
            raise ValueError(
                "graph: expected prefills that can be captured as CUDA graphs, got "
                f"{'; '.join(self.graphs.told) or 'none'}. Set graph=false."
            )

    def hook_seconds(self) -> float:
        """Time in the engine's hooks before decoder and layers, in the latest pruned run.

        Scoring and selecting, and gathering what survives: all that pruning adds to the layers.
        """
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(self.clock.seconds(start, end) for start, end in pairs)

    # -- prefill, decoding, training -------------------------------------------------------------

    @torch.no_grad()
    def prefill(self) -> Any:
        """From embeddings to the logits of the first new token; the filled cache."""
        output = self.model(inputs_embeds=self.embeds, use_cache=True, logits_to_keep=1)
        return output.past_key_values

    @torch.no_grad()
    def decode(self, cache: Any) -> None:
        """Greedy decoding of `new_tokens` tokens."""
        ids = torch.zeros(self.load.batch_size, 1, dtype=torch.int64, device=self.device)
        for _ in range(self.load.new_tokens):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Forward, backward and the optimiser's update."""
        output = self.model(inputs_embeds=self.embeds, labels=self.labels, use_cache=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def before_cuts(self) -> list[tuple[Any, Tensor]]:
        """Layer of each cut, and hidden states (B, T, D) as long as those before it."""
        lengths = self.theory.lengths()
        found = []
        for stage in self.pruning.schedule.stages:
            before = lengths[stage.layer - 1] if stage.layer else self.load.num_visual
            hidden = self.embeds[:, : before + self.load.num_text].contiguous()
            found.append((self.decoder.layers[stage.layer], hidden))
        return found

    @torch.no_grad()
    def project_keys(self, before_cuts: list[tuple[Any, Tensor]]) -> None:
        """Key projections alone, of the tokens before each cut: the least that scoring needs."""
        for layer, hidden in before_cuts:
            layer.self_attn.k_proj(hidden)

    def variants(self, measure: str, optimizer: torch.optim.Optimizer | None) -> dict[str, Variant]:
        """What is compared: `unpruned`, `pruned` and, for strategies that score, `keys`.

        Decoding also has `marked`, which the time in the hooks is read from: a step is so short
        that two device events per layer would be seen in `pruned`. The ways follow by name.
        """
        contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "unpruned": nullcontext,
            "pruned": partial(self.pruned, marked=measure != "decode"),
        }
        contexts |= {way: partial(self.pruned, way) for way in self.ways}
        if self.graphs is not None:
            contexts |= {name: partial(self.captured, own) for name, own in CAPTURED.items()}
        if measure == "decode":
            # Every round continues from a copy of the same cache, so that its context is the same.
            filled = {}
            for name, context in contexts.items():
                with context():
                    filled[name] = self.prefill()
            contexts["marked"], filled["marked"] = self.pruned, filled["pruned"]
            found = {
                name: Variant(context, partial(copy.deepcopy, filled[name]), self.decode)
                for name, context in contexts.items()
            }
        elif measure == "train":
            assert optimizer is not None
            found = {
                name: Variant(context, lambda: optimizer, self.step)
                for name, context in contexts.items()
            }
        else:
            found = {
                name: Variant(context, lambda: None, lambda _: self.prefill())
                for name, context in contexts.items()
            }
        attention: Any = getattr(self.decoder.layers[0], "self_attn", None)
        scores = bool(decoder_rows(self.pruning.strategy))
        if measure != "decode" and scores and hasattr(attention, "k_proj"):
            found["keys"] = Variant(nullcontext, self.before_cuts, self.project_keys)
        return found
