"""What the vision tower says of each visual token (oracle: the same tower, run eager and recorded).

Which patches make up a token is not read from the package but seen: with the tower's attention
silenced, a patch that is disturbed moves the tokens that it is part of, and no others.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tokenprune as tp
from tokenprune.families.anatomy import examine
from tokenprune.families.tower import VisionParts
from zoo.checks import Check, forward, schedule
from zoo.specimen import Specimen

CLOSE = {"rtol": 0, "atol": 1e-5}
TILES = "tiles"
LAYERS = (0, -1)  # of two: in Qwen2.5-VL the first sees windows, the last whole frames
#: Types whose tower has a class token, and where in a sequence it is.
CLASS_TOKENS = {
    "llava": 0,
    "llava_next": 0,
    "llava_next_video": 0,
    "video_llava": 0,
    "vipllava": 0,
    "internvl": 0,
    "qianfan_ocr": 0,
    "llama4": -1,
}


def needs_of(model_type: str) -> tuple[Any, ...]:
    """All that a tower can be asked."""
    queries = ["all", "class"] if model_type in CLASS_TOKENS else ["all"]
    rows = [tp.VisionRows(layer, asked) for layer in LAYERS for asked in queries]
    if model_type in ("llava", "llava_next", "internvl"):
        rows.append(tp.VisionRows(-1, "class", "one"))
    whats = ("hidden", "keys", "queries")
    return (*rows, *(tp.VisionStates(layer, what) for layer in LAYERS for what in whats))


@dataclass(frozen=True)
class Listening(tp.ScoreStrategy):
    """Keeps what its place says, and notes what the view shows of the tower."""

    wants: tuple[Any, ...] = (tp.VisionRows(),)
    notes: list[Any] = field(default_factory=list, compare=False)

    def needs(self) -> tuple[Any, ...]:
        return self.wants

    def score(self, view: tp.TokenView) -> Tensor:
        seen = {}
        for need in self.wants:
            if isinstance(need, tp.VisionRows):
                rows = view.vision_rows(need.layer, need.queries, need.heads)
                seen[need] = rows.transpose(1, 2)
            else:
                seen[need] = view.vision_states(need.layer, need.what)
        seen[TILES] = view.tiles
        self.notes.append((seen, view.has_patches, view.valid))
        fullest = [int(row[row >= 0].bincount().max()) for row in view.tiles if (row >= 0).any()]
        most, length = view.tile_shape
        assert most >= int(view.tiles.max()) + 1
        assert length >= max(fullest)
        assert len(self.notes) > 1 or (most, length) == (int(view.tiles.max()) + 1, max(fullest))
        return (view.positions * 37 % 101).float()


# ------------------------------------------------------------------------------------ the reference


def layers_of(parts: VisionParts, kind: str) -> tuple[nn.Module, ...]:
    """The layers that pictures of a kind go through."""
    return parts.others[0] if kind == "video" and parts.others else parts.layers


@contextmanager
def recorded(model: Any, kind: str = "image") -> Iterator[Callable[[int], dict[str, list[Tensor]]]]:
    """The tower under eager attention: by layer, what its attention computes, and its output."""
    parts = examine(model).vision
    layers = layers_of(parts, kind)
    notes: dict[nn.Module, dict[str, list[Tensor]]] = {}
    configured = [part for part in model.modules() if hasattr(part, "config")]
    before = {part: part.config._attn_implementation for part in configured}
    for config in (part.config for part in before):
        config._attn_implementation_internal = "eager"
    attentions = [getattr(layer, parts.tower.attention) for layer in layers]
    module = sys.modules[type(attentions[0]).__module__]
    name = "eager_attention_forward"
    name = f"vision_{name}" if hasattr(module, f"vision_{name}") else name
    original = getattr(module, name)

    def noted(own, *args, **kwargs):
        output, weights = original(own, *args, **kwargs)
        notes.setdefault(own, {}).setdefault("weights", []).append(weights.detach())
        return output, weights

    hooks = []
    for layer, own in zip(layers, attentions, strict=True):
        hooks.append(layer.register_forward_hook(_keep(notes, own, "hidden")))
        for projection in {parts.tower.queries, parts.tower.keys}:
            hook = _keep(notes, own, projection)
            hooks.append(getattr(own, projection).register_forward_hook(hook))
    with patch.object(module, name, noted):
        yield lambda layer: notes[attentions[layer]]
    for hook in hooks:
        hook.remove()
    for part, before_it in before.items():
        part.config._attn_implementation_internal = before_it


def _keep(notes: Any, own: nn.Module, name: str) -> Callable[..., None]:
    def hook(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        notes.setdefault(own, {}).setdefault(name, []).append(output.detach())

    return hook


def make_features(model: Any, inputs: dict[str, Tensor], kind: str = "image") -> Tensor:
    """Visual tokens of a call, (T, D), as they come out of the method that makes them."""
    base = examine(model).vision.base
    method = getattr(base, f"get_{kind}_features")
    names = set(inspect.signature(method).parameters) & set(inputs)
    with torch.no_grad():
        output = method(**{name: inputs[name] for name in names})
    made = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    parts = [made] if isinstance(made, Tensor) else made
    return torch.cat([part.flatten(0, -2) for part in parts])


def seen_shares(
    model: Any, inputs: dict[str, Tensor], kind: str = "image"
) -> tuple[Tensor, list[int]]:
    """Share of each patch in each token, (T, P), equal ones, and patches of each sequence.

    Seen by disturbing the patches.
    """
    parts = examine(model).vision
    layers = layers_of(parts, kind)
    disturbed: list[tuple[int, int]] = []
    shape: list[torch.Size] = []

    def silence(module, args, output):
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    def disturb(module, args, kwargs):
        name = None if args else list(inspect.signature(type(module).forward).parameters)[1]
        hidden = args[0] if args else kwargs[name]
        shape.append(hidden.shape)
        for tile, place in disturbed:
            hidden = hidden.clone()
            own = hidden[tile, place] if hidden.dim() == 3 else hidden[place]
            own += torch.linspace(-3, 5, own.shape[-1]).cos() * 4
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {name: hidden})

    hooks = [
        getattr(layer, parts.tower.attention).register_forward_hook(silence) for layer in layers
    ]
    pooling = getattr(getattr(parts.base, "multi_modal_projector", None), "image_pooling_2d", None)
    if pooling is not None:  # it asks all patches of a token alike, instead of a few
        hooks.append(pooling.q_proj.register_forward_hook(silence))
    hooks.append(layers[0].register_forward_pre_hook(disturb, with_kwargs=True))
    plain = make_features(model, inputs, kind)
    tiles, length = shape[0][:2] if len(shape[0]) == 3 else (1, shape[0][0])
    places = range(*parts.span(length))
    columns = []
    for tile in range(tiles):
        for place in places:
            disturbed[:] = [(tile, place)]
            change = (make_features(model, inputs, kind) - plain).abs().amax(1)
            columns.append(change > 1e-6 * plain.abs().max())
    for hook in hooks:
        hook.remove()
    moved = torch.stack(columns, 1).float()
    return moved / moved.sum(1, keepdim=True).clamp_min(1), [len(places)] * tiles


def frames_of(model: Any, inputs: dict[str, Tensor], kind: str) -> list[int] | None:
    """Patches of each frame, for towers that pack them into one sequence."""
    if f"{kind}_grid_thw" in inputs:
        return [h * w for t, h, w in inputs[f"{kind}_grid_thw"].tolist() for _ in range(t)]
    if model.config.vision_config.model_type == "pixtral":
        edge = model.config.vision_config.patch_size
        return [(h // edge) * (w // edge) for h, w in inputs["image_sizes"].tolist()]
    return None


def expected_signals(
    model: Any, inputs: dict[str, Tensor], needs: tuple[Any, ...], kind: str = "image"
) -> dict[Any, Tensor]:
    """Signals of a call's visual tokens by need, (T, ...), and under None which have patches."""
    parts = examine(model).vision
    shares, sizes = seen_shares(model, inputs, kind)
    frames = frames_of(model, inputs, kind)
    with recorded(model, kind) as notes:
        make_features(model, inputs, kind)
    signals: dict[Any, Tensor] = {None: shares.sum(1) > 0}
    signals[TILES] = _tiles(sizes if frames is None else frames, shares)
    class_token = CLASS_TOKENS.get(model.config.model_type)
    for need in needs:
        known = notes(need.layer)
        if isinstance(need, tp.VisionRows):
            if need.heads == "one":
                values = _as_one_head(known[parts.tower.queries], known[parts.tower.keys])
            elif frames is not None:
                values = _per_frame(known["weights"], frames)
            else:
                values = attention_per_patch(known["weights"], need.queries, class_token)
        else:
            names = {"hidden": "hidden", "keys": parts.tower.keys, "queries": parts.tower.queries}
            (state,) = known[names[need.what]]
            if parts.tower.queries == parts.tower.keys and need.what != "hidden":
                attention = parts.attention(need.layer)
                own = getattr(attention, "q_dim", state.shape[-1] // 3)
                start, stop = (0, own) if need.what == "queries" else (own, None)
                state = state[..., start : stop or own + (state.shape[-1] - own) // 2]
            state = state if state.dim() == 3 else state[None]
            values = without_class(state, class_token).flatten(0, 1)
        signals[need] = shares @ values
    return signals


def without_class(values: Tensor, class_token: int | None) -> Tensor:
    """(N, L, ...) without the class token."""
    return values if class_token is None else values[:, 1:] if class_token == 0 else values[:, :-1]


def _tiles(sizes: list[int], shares: Tensor) -> Tensor:
    """The tile, or frame, of each token's last patch, through the whole call; -1 for none."""
    last = (shares > 0).float() * torch.arange(1, shares.shape[1] + 1)
    last = last.amax(1).long() - 1
    of_patch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return of_patch[last.clamp_min(0)].where(last >= 0, -1)


def attention_per_patch(weights: list[Tensor], queries: str, class_token: int | None) -> Tensor:
    """Per tile, what its patches get from the class token, or from all that are no padding."""
    (weights_NHLL,) = weights
    parts = []
    for tile in weights_NHLL:
        gets = without_class(tile.permute(1, 2, 0).contiguous(), class_token)  # (asking, L, H)
        if queries == "class":
            parts.append(gets[class_token])
            continue
        real = tile.amax((0, 1)) > 0
        if class_token is not None:
            real[class_token] = False
        parts.append(gets[real].sum(0) / real.sum())
    return torch.cat(parts)


def _as_one_head(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """Per tile, what its patches get from the class token if all channels are one head's."""
    (queries_NLC,), (keys_NLC,) = queries, keys
    logits = queries_NLC[:, :1] @ keys_NLC.transpose(1, 2) / queries_NLC.shape[2] ** 0.5
    return logits.softmax(2)[:, 0, 1:].flatten()[:, None]


def _per_frame(weights: list[Tensor], frames: list[int]) -> Tensor:
    """What patches get from those they see, divided by the frame's patches."""
    received = torch.cat([run[0].sum(1) for run in weights], 1).T  # (P, H)
    sizes = torch.tensor(frames)
    return received / sizes.repeat_interleave(sizes)[:, None]


# -------------------------------------------------------------------------------------- comparisons


def assert_heard(strategy: Listening, expected: dict[Any, Tensor], counts: list[int]) -> None:
    """What the view of the first cut showed, against signals of all tokens, row after row."""
    seen, has, valid = strategy.notes[0]
    assert valid.sum(1).tolist() == counts
    start = 0
    for row, count in enumerate(counts):
        own = expected[TILES][start : start + count]
        _, order = own[own >= 0].unique(return_inverse=True)
        own = own.masked_scatter(own >= 0, order)
        assert torch.equal(seen[TILES][row][valid[row]], own)
        start += count
    assert (seen[TILES][~valid] == -1).all()
    assert torch.equal(has[valid], expected[None])
    assert not has[~valid].any()
    for need in strategy.wants:
        torch.testing.assert_close(seen[need][valid], expected[need], **CLOSE)
        assert not seen[need][~valid].any()


def counts_of(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Visual tokens of each row."""
    return tp.visual_mask(model, inputs["input_ids"]).sum(1).tolist()


# --------------------------------------------------------------------------------------- the checks


def tower_signals(specimen: Specimen, model: PreTrainedModel) -> None:
    """What strategies are shown of the tower is the same tower's eager attention and states."""
    known = examine(model).vision is not None
    needs = needs_of(model.config.model_type) if known else (tp.VisionRows(queries="all"),)
    strategy, inputs = Listening(needs), specimen.batch(model)
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
    assert_heard(strategy, expected_signals(model, inputs, needs), counts_of(model, inputs))


def class_token(specimen: Specimen, model: PreTrainedModel) -> str:
    """Whether the tower has one, for strategies that read what it attends to."""
    parts = examine(model).vision
    if parts is None:
        return "-"
    try:
        tp.attach(model, Listening((tp.VisionRows(),)), schedule(specimen)).remove()
    except ValueError:
        return "no"
    return "yes"


def patches_to_tokens(specimen: Specimen, model: PreTrainedModel) -> str:
    """How many patches of the tower make up a token of an image: one, or several."""
    if examine(model).vision is None:
        return "-"
    shares, _ = seen_shares(model, specimen.batch(model))
    return "several" if (shares > 0).sum(1).max() > 1 else "one"


def grid(specimen: Specimen, model: PreTrainedModel) -> str:
    """Whether it is known in which row and column of its image each token of patches sits."""

    @dataclass(frozen=True)
    class Looking(tp.ScoreStrategy):
        places: list[Tensor] = field(default_factory=list, compare=False)

        def score(self, view: tp.TokenView) -> Tensor:
            self.places.append(view.places[view.valid])
            return view.positions.float()

    strategy, inputs = Looking(), specimen.batch(model)
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
    known = (strategy.places[0][:, 1:] >= 0).all(1)
    if known.any() and not known.all():  # what stands around an image is of no patch
        known |= seen_shares(model, inputs)[0].sum(1) == 0
    return "yes" if known.all() else "no"


TOWER_CHECKS: dict[str, Check] = {
    check.__name__: check for check in (tower_signals, class_token, patches_to_tokens, grid)
}
