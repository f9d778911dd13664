"""A prefill that is replayed gives what one that runs gives, and asks the host for nothing.

What a CUDA graph does is done here on a device that is far away (`far.py`): the operations that the
device ran are run again, on the tensors that they were run on, and no Python in between.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from far import Device, Far, Tape, capture, far, near
from models import ROWS, batch, build
from oracles import tiny
from zoo import ZOO

import tokenprune as tp
from tokenprune.engine.graphs import Graphs

SCHEDULE = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
#: They say how many tokens they keep, which the host must know.
COUNTED = [name for name in tp.available() if not tp.build_strategy(name).keeps_exactly]


@pytest.fixture(scope="module")
def models():
    return {"llava": (model := build("llava"), far(model))}


@pytest.fixture(autouse=True)
def tapes(monkeypatch) -> None:
    monkeypatch.setattr(Graphs, "_capture", capture)


def pictures(inputs, seed: int):
    """The same call with other pictures."""
    pixels = inputs["pixel_values"]
    other = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return inputs | {"pixel_values": other.to(pixels)}


def call(model, inputs, strategy, graphs=None, schedule=SCHEDULE, **options):
    """Logits, keys and values, tokens kept, and those of a step after it, near."""
    rows = len(inputs["input_ids"])
    pruning = tp.prune(model, strategy, schedule, graphs=graphs, **options)
    with Device(), torch.no_grad(), pruning as trace:
        output = model(**inputs)
        cache = output.past_key_values
        held = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        kept = [row for stage in trace.stages for row in stage.kept]
        scores = [row for stage in trace.stages for row in stage.scores or []]
        lengths = trace.lengths
        step = model(input_ids=far(torch.full((rows, 1), 7)), past_key_values=cache)
    return [near(each) for each in (output.logits, *held, *kept, *scores, lengths, step.logits)]


def assert_alike(graphs, model, inputs, strategy, times=3, **options) -> None:
    for seed in range(times):
        own = far(pictures(inputs, seed))
        expected = call(model, own, strategy, **options)
        found = call(model, own, strategy, graphs, **options)
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert graphs.replays == seed  # the first runs
    assert len(graphs) == 1


@pytest.mark.parametrize("positions", tp.POSITIONS)
@pytest.mark.parametrize("name", [name for name in tp.available() if name not in COUNTED])
@pytest.mark.share(6)
def test_a_replay_gives_what_a_run_gives(models, name, positions) -> None:
    strategy, (near_model, model) = tiny(name), models["llava"]
    inputs = batch(near_model, ROWS[:1])
    assert_alike(tp.Graphs(2), model, inputs, strategy, positions=positions)


def test_other_words_are_no_other_kind(models) -> None:
    """Few as they are: fewer tokens than the numbers that say the sizes of images."""
    near_model, model = models["llava"]
    inputs, graphs = batch(near_model, ROWS[:1]), tp.Graphs(2)
    text = ~tp.visual_mask(near_model, inputs["input_ids"])
    for word in (5, 6, 7):
        own = far(inputs | {"input_ids": inputs["input_ids"].masked_fill(text, word)})
        expected = call(model, own, tp.build_strategy("fastv"))
        found = call(model, own, tp.build_strategy("fastv"), graphs)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert (graphs.replays, len(graphs)) == (2, 1)


@pytest.mark.parametrize("logits", ["all", "full"])
@pytest.mark.parametrize("name", ["pyramiddrop", "random"])
@pytest.mark.share(2)
def test_rows_alike_and_full_logits(models, name, logits) -> None:
    near_model, model = models["llava"]
    inputs = batch(near_model, [ROWS[0]] * 2)
    assert_alike(tp.Graphs(2), model, inputs, tp.build_strategy(name), logits=logits)


def test_the_unpruned_model(models) -> None:
    near_model, model = models["llava"]
    inputs = batch(near_model, ROWS[:1])
    assert_alike(tp.Graphs(2), model, inputs, tp.build_strategy("fastv"), schedule=tp.Schedule())


#: Of the zoo those whose prefills are not recorded, and why.
NOT_RECORDED = {
    "mask over pairs": (
        "gemma3",
        "shieldgemma2",
        "paligemma",
        "gemma4",
        "gemma4_unified",
        "molmo2",
    ),
    "does more than grow": (
        *("idefics2", "aya_vision", "exaone4_5", "muse_glimmer", "muse_spark", "step3p7"),
        *("cohere2_vision", "cohere_compass", "llama4"),
    ),
    "not the device's alone": ("chameleon", "ernie4_5_vl_moe"),
}
_WHY = {name: why for why, names in NOT_RECORDED.items() for name in names}
_SOME = ("qwen3_vl", "internvl", "gemma3", "idefics2")
#: They find their visual tokens by a mask of the call.
_MASKED = ("kosmos-2", "kosmos-2.5")


def kinds():
    for name in ZOO:
        if name not in _MASKED:
            yield pytest.param(name, marks=() if name in _SOME else pytest.mark.matrix)


@pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair
@pytest.mark.parametrize("name", [*kinds()])
def test_every_model_type_is_replayed_or_runs(name) -> None:
    model = ZOO[name].build("sdpa")
    inputs, graphs = ZOO[name].batch(model, [(3, "image", 5)]), tp.Graphs(2)
    strategy, schedule = tp.build_strategy("pyramiddrop"), tp.Schedule.one_shot(layer=2, keep=0.5)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        own = {
            key: torch.randn(value.shape, generator=generator).to(value)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for key, value in inputs.items()
        }
        found = []
        for kept in (None, graphs):
            with torch.no_grad(), tp.prune(model, strategy, schedule, graphs=kept) as trace:
                logits = model(**own, use_cache=True).logits
                found.append([logits, *(row for stage in trace.stages for row in stage.kept)])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    # That a decoder makes no cache which it is not given is known after its first call: for
    # Granite 4 Vision's the second is another kind.
    expected = 1 if name == "granite4_vision" else 2
    assert graphs.replays == (0 if name in _WHY else expected)
    assert len(graphs.told) == (name in _WHY)
    assert all(_WHY[name] in said for said in graphs.told), graphs.told


@pytest.mark.filterwarnings("ignore")  # the mask of the whole model's features is the model's
def test_features_of_tokens_that_are_not_all_marked_are_left_to_the_model() -> None:
    """It adds them by a mask of its own, which is no matter where the first cut comes later."""
    model = ZOO["qwen3_vl"].build("sdpa")
    inputs = ZOO["qwen3_vl"].batch(model, [(3, "image", 5)])
    marks = tp.visual_mask(model, inputs["input_ids"])
    marks[0, marks[0].nonzero()[:2, 0]] = False
    strategy, schedule = tp.build_strategy("pyramiddrop"), tp.Schedule.one_shot(layer=3, keep=0.5)
    found = []
    for graphs in (None, tp.Graphs(2)):
        pruning = tp.prune(model, strategy, schedule, visual_mask=marks, graphs=graphs)
        with torch.no_grad(), pruning:
            found += [model(**inputs).logits for _ in range(2)]
    assert all(torch.equal(found[0], logits) for logits in found[1:])


def test_what_was_given_out_stays(models) -> None:
    """A later replay writes on nothing that an earlier one returned."""
    near_model, model = models["llava"]
    strategy, graphs = tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    inputs = batch(near_model, ROWS[:1])
    with Device(), torch.no_grad(), tp.prune(model, strategy, SCHEDULE, graphs=graphs) as trace:
        for seed in range(3):
            output = model(**far(pictures(inputs, seed)))
        cache = output.past_key_values
        parts = [output.logits, *(layer.keys for layer in cache.layers)]
        parts += [row for stage in trace.stages for row in stage.kept]
        before = [near(part).clone() for part in parts]
        model(**far(pictures(inputs, 3)))
    assert graphs.replays == 3
    assert all(torch.equal(near(part), own) for part, own in zip(parts, before, strict=True))


def test_a_trace_is_of_its_own_call_whenever_it_is_looked_at(models) -> None:
    near_model, model = models["llava"]
    strategy, graphs = tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    calls = [far(pictures(batch(near_model, ROWS[:1]), seed)) for seed in range(4)]

    def kept(trace):
        with Device():
            return [near(row).tolist() for stage in trace.stages for row in stage.kept]

    def traced(inputs, graphs=None):
        with Device(), torch.no_grad(), tp.prune(model, strategy, SCHEDULE, graphs=graphs) as trace:
            model(**inputs)
        return trace

    expected = [kept(traced(inputs)) for inputs in calls]
    assert len({str(own) for own in expected}) > 1
    traces = [traced(inputs, graphs) for inputs in calls]
    assert graphs.replays == 3
    assert [kept(trace) for trace in traces] == expected


def test_hooks_on_all_modules_go_on_being_called(models) -> None:
    near_model, model = models["llava"]
    own, graphs = far(batch(near_model, ROWS[:1])), tp.Graphs(2)
    for register in (
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call(model, own, tp.build_strategy("fastv"), graphs)
        finally:
            handle.remove()
        assert graphs.told == ["hooks of others on the decoder's layers"]
        assert len(caught) <= 1


@pytest.mark.parametrize("positions", tp.POSITIONS)
def test_a_generation_goes_on_from_a_replay(models, positions) -> None:
    near_model, model = models["llava"]
    strategy, graphs = tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    inputs = batch(near_model, ROWS[:1])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for seed in range(3):
        own = pictures(inputs, seed)
        with tp.prune(near_model, strategy, SCHEDULE, positions) as expected:
            wanted = near_model.generate(**own, **options)
        with Device(), tp.prune(model, strategy, SCHEDULE, positions, graphs=graphs) as trace:
            found = model.generate(**far(own), **options)
            kept = [near(row) for stage in trace.stages for row in stage.kept]
        assert near(found).tolist() == wanted.tolist()
        theirs = [row for stage in expected.stages for row in stage.kept]
        assert all(torch.equal(*pair) for pair in zip(kept, theirs, strict=True))
    assert graphs.replays == 2


def change_weights(model) -> None:
    weight = model.get_decoder().layers[3].mlp.down_proj.weight
    weight.near = weight.near + 0.5


def change_a_mode(model) -> None:
    model.get_decoder().layers[3].mlp.training = True


def change_a_setting(model) -> None:
    model.get_decoder().layers[3].self_attn.scaling = 1.0


def change_the_config(model) -> None:
    model.get_decoder().config.rms_norm_eps = 1e-3


def test_hooks_of_others_go_on_being_called(models) -> None:
    near_model, model = models["llava"]
    strategy, graphs, called = tp.build_strategy("pyramiddrop"), tp.Graphs(2), []
    own = far(batch(near_model, ROWS[:1]))
    for _ in range(3):
        call(model, own, strategy, graphs)
    handle = model.get_decoder().layers[3].register_forward_hook(lambda *_: called.append(1))
    with pytest.warns(UserWarning, match="hooks of others"):
        call(model, own, strategy, graphs)
    handle.remove()
    assert len(called) == 2  # and in the step after it
    assert graphs.replays == 2
    call(model, own, strategy, graphs)
    assert graphs.replays == 3


def test_a_model_that_was_asked_for_its_attention_is_replayed() -> None:
    """transformers leaves hooks on its layers, which hear only calls that ask again."""
    near_model = build("llava", "eager")
    inputs = batch(near_model, ROWS[:1])
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        near_model(**inputs, **asked)
    model, strategy, graphs = far(near_model), tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    assert_alike(graphs, model, inputs, strategy, times=3)
    pruning = tp.prune(model, strategy, SCHEDULE, graphs=graphs)
    said = pytest.warns(UserWarning, match="the attention or the hidden states")
    with Device(), torch.no_grad(), pruning, said:
        output = model(**far(inputs), **asked)
    assert len(output.attentions) == len(output.hidden_states) - 1 == 6


@pytest.mark.parametrize(
    "change", [change_weights, change_a_mode, change_a_setting, change_the_config]
)
def test_a_model_that_was_changed_is_recorded_anew(change) -> None:
    near_model = build("llava")
    model, strategy, graphs = far(near_model), tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    inputs = batch(near_model, ROWS[:1])
    assert_alike(graphs, model, inputs, strategy, times=2)
    change(model)
    own = far(pictures(inputs, 7))
    expected = call(model, own, strategy)
    found = call(model, own, strategy, graphs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert graphs.replays == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft
def test_adapters_that_are_switched_off_are_another_kind() -> None:
    peft = pytest.importorskip("peft")
    near_model = build("llava")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(near_model, config).eval()
    model, strategy, graphs = far(wrapped), tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    own = far(batch(near_model, ROWS[:1]))
    with_them = [call(model, own, strategy, graphs)[0] for _ in range(3)]
    assert graphs.replays == 2
    with model.disable_adapter():
        without = call(model, own, strategy, graphs)[0]
    assert graphs.replays == 2
    assert torch.equal(with_them[0], with_them[2])
    assert not torch.allclose(with_them[0], without)


def test_other_prompts_are_other_kinds_and_the_oldest_makes_room(models) -> None:
    near_model, model = models["llava"]
    strategy, graphs = tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    calls = [far(batch(near_model, [row])) for row in (ROWS[0], *ROWS[2:])]
    with Device(), torch.no_grad(), tp.prune(model, strategy, SCHEDULE, graphs=graphs):
        for inputs in [*calls, *calls]:
            model(**inputs)
        assert (graphs.replays, len(graphs)) == (3, 2)
        model(**calls[2])
        assert graphs.replays == 4
    other = tp.build_strategy("pyramiddrop", source="previous")
    for strategy, replays in ((other, 4), (tp.build_strategy("pyramiddrop"), 5)):
        with Device(), torch.no_grad(), tp.prune(model, strategy, SCHEDULE, graphs=graphs):
            model(**calls[2])
        assert graphs.replays == replays
    graphs.clear()
    assert len(graphs) == 0


def test_a_graph_keeps_what_it_reads(models) -> None:
    """Else the memory would be another's at the next replay."""
    near_model, model = models["llava"]
    strategy, graphs, own = tiny("pool"), tp.Graphs(2), far(batch(near_model, ROWS[:1]))
    expected = [call(model, own, strategy, graphs) for _ in range(3)][2]
    (graph,) = graphs._known.values()
    for table in graph.fixed.values():
        near(table).fill_(0)
    changed = call(model, own, strategy, graphs)
    assert graphs.replays == 3
    assert not all(torch.equal(*pair) for pair in zip(changed, expected, strict=True))


@pytest.mark.parametrize("name", COUNTED)
def test_strategies_that_count_run_and_say_so(models, name) -> None:
    near_model, model = models["llava"]
    strategy, own = tiny(name), far(batch(near_model, ROWS[:1]))
    expected = call(model, own, strategy)
    graphs = tp.Graphs(2)
    with pytest.warns(UserWarning, match="which says how many tokens it keeps"):
        found = call(model, own, strategy, graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, own, strategy, graphs)  # it was said
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert graphs.replays == 0


def test_work_that_waits_for_the_device_runs_and_says_so(models, monkeypatch) -> None:
    def score(self, view):
        return view.hidden[..., 0] * float(view.hidden.sum())

    def counting(*args):
        attempts.append(1)
        return capture(*args)

    near_model, model = models["llava"]
    kind, attempts = type(tp.build_strategy("pyramiddrop")), []
    monkeypatch.setattr(kind, "score", score)
    monkeypatch.setattr(Graphs, "_capture", counting)
    own, graphs = far(batch(near_model, ROWS[:1])), tp.Graphs(2)
    with Device(), torch.no_grad(), tp.prune(model, kind(), SCHEDULE, graphs=graphs):
        first = model(**own).logits
        with pytest.warns(UserWarning, match="not the device's alone .*waits for the device"):
            second = model(**own).logits
        further = [model(**own).logits for _ in range(3)]
    for logits in (second, *further):
        assert torch.equal(near(first), near(logits))
    assert (graphs.replays, len(attempts)) == (0, 1)


def test_marks_that_a_device_would_have_to_count_are_seen(models) -> None:
    """Indices by a mask, on a GPU, have a number that it must tell."""
    tape, values = Tape(), far(torch.arange(4.0))
    for work in (
        lambda: values[values > 1],
        lambda: (
            values.clone().masked_scatter_(values > 1, values).index_put_((values > 1,), values[:1])
        ),
        lambda: torch.repeat_interleave(values.long()),
    ):
        with pytest.raises(RuntimeError, match="not permitted"), tape:
            work()
    with tape:
        values[values.long()] + values.where(values > 1, 0)


@dataclass(frozen=True)
class Listed(tp.ScoreStrategy):
    """A strategy that has no hash."""

    weights: list[float] = field(default_factory=lambda: [1.0])

    def score(self, view):
        return view.hidden[..., 0] * self.weights[0]


def test_strategies_without_a_hash_run_and_say_so(models) -> None:
    near_model, model = models["llava"]
    own, graphs = far(batch(near_model, ROWS[:1])), tp.Graphs(2)
    with pytest.warns(UserWarning, match="a call with unhashable type"):
        found = call(model, own, Listed(), graphs)
    assert all(torch.equal(*pair) for pair in zip(found, call(model, own, Listed()), strict=True))


def test_a_model_that_is_gone_takes_its_graphs_along() -> None:
    near_model, graphs = build("llava"), tp.Graphs(2)
    inputs = batch(near_model, ROWS[:1])
    model = copy.deepcopy(near_model)
    for _ in range(2):
        with torch.no_grad(), tp.prune(model, tp.build_strategy("fastv"), SCHEDULE, graphs=graphs):
            model(**inputs)
    assert len(graphs) == 1
    (graph,) = graphs._known.values()
    vars(graph)["replay"] = None  # a tape keeps weights, which a CUDA graph does not
    del graph, model
    gc.collect()
    assert len(graphs) == 0


def test_threads_take_turns(models) -> None:
    near_model = models["llava"][0]
    strategy, graphs = tp.build_strategy("pyramiddrop"), tp.Graphs(2)
    calls = [pictures(batch(near_model, ROWS[:1]), seed) for seed in range(4)]
    with torch.no_grad(), tp.prune(near_model, strategy, SCHEDULE):
        expected = [near_model(**inputs).logits for inputs in calls]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            for turn in range(4):
                found[number, turn] = near_model(**calls[number]).logits

    with tp.prune(near_model, strategy, SCHEDULE, graphs=graphs):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert graphs.replays == 15
    assert len(found) == 16
    for (number, _), logits in found.items():
        assert torch.equal(logits, expected[number])


def test_a_choice_on_the_host_after_one_on_the_device_runs_and_says_so(models) -> None:
    near_model = models["llava"][0]
    parts = map(tp.build_strategy, ("pyramiddrop", "uniform", "fastv"))
    strategy, graphs = tp.PerStage(tuple(parts)), tp.Graphs(2)
    own = batch(near_model, ROWS[:1])
    with torch.no_grad(), tp.prune(near_model, strategy, SCHEDULE, graphs=graphs):
        with pytest.warns(UserWarning, match="got Uniform after PyramidDrop, on the host"):
            near_model(**own)
        near_model(**own)
    assert graphs.replays == 0


def refusals():
    yield "padded", "packed or padded", {}
    yield "gradients", "outside torch.no_grad", {}
    yield "states", "attention or the hidden states", {"output_hidden_states": True}


@pytest.mark.parametrize(("case", "said", "options"), [*refusals()])
def test_calls_that_are_not_recorded_say_why(models, case, said, options) -> None:
    near_model, model = models["llava"]
    rows = ROWS[:2] if case == "padded" else ROWS[:1]
    own, graphs = far(batch(near_model, rows)), tp.Graphs(2)
    pruning = tp.prune(model, tp.build_strategy("fastv"), SCHEDULE, graphs=graphs)
    grads = torch.set_grad_enabled(case == "gradients")
    with Device(), grads, pruning, pytest.warns(UserWarning, match=said):
        output = model(**own, **options)
    assert isinstance(output.logits, Far)


def test_on_a_host_it_says_so_and_runs(monkeypatch) -> None:
    monkeypatch.undo()
    model = build("llava")
    inputs, graphs = batch(model, ROWS[:1]), tp.Graphs(2)
    strategy = tp.build_strategy("pyramiddrop")
    with torch.no_grad(), tp.prune(model, strategy, SCHEDULE):
        expected = model(**inputs).logits
    with torch.no_grad(), tp.prune(model, strategy, SCHEDULE, graphs=graphs):
        model(**inputs)
        with pytest.warns(UserWarning, match="a model on cpu"):
            found = model(**inputs).logits
    assert torch.equal(found, expected)
    assert "forward" not in vars(model.get_decoder())


@pytest.mark.parametrize("most", [0, -1, 2.5, True, "8"])
def test_numbers_of_graphs_that_are_none(most) -> None:
    with pytest.raises(ValueError, match="expected a number of graphs"):
        tp.Graphs(most)


def test_a_number_is_no_graphs() -> None:
    with pytest.raises(ValueError, match=r"expected a Graphs, got 8.*Graphs\(8\)"):
        tp.attach(build("llava"), tp.build_strategy("fastv"), SCHEDULE, graphs=8)
