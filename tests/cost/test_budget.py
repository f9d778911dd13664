"""Budgets: the solver, its words, the configs, the command, and docs/budgets.md."""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenprune as tp
from tokenprune import cost
from tokenprune.cli import main as cli
from tokenprune.cli.configs import compose
from tokenprune.cost import solver
from tokenprune.cost.figures import Figures, Workload
from tokenprune.runs import budgets
from tokenprune.runs.compose import build_pruning
from tokenprune.runs.models import load_config

DOC = Path(__file__).parents[2] / "docs" / "budgets.md"
LLAVA = Workload(cost.DecoderShape.preset("llava-1.5-7b"), 576)
NEXT = Workload(cost.DecoderShape.preset("llava-next-7b"), 2880)
PDROP = tp.build_strategy("pyramiddrop")
EVEN = solver.pyramid([8, 16, 24])
FASTV = solver.one_shot(2)


# --------------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize(
    ("workload", "family", "target", "value", "solved"),
    [
        (LLAVA, EVEN, "avg_tokens", 270, 0.5),  # PyramidDrop's own average
        (LLAVA, FASTV, "avg_tokens", 306, 0.5),  # FastV's
        (LLAVA, FASTV, "avg_tokens", 192, 0.288),  # 166 tokens after layer 2
        (LLAVA, FASTV, "avg_tokens", 128, 0.17),  # 98
        (LLAVA, FASTV, "avg_tokens", 64, 0.052),  # 30
        (LLAVA, FASTV, "final_tokens", 57, 0.099),
        (NEXT, EVEN, "tflops", 9.4646, 0.5),
        (NEXT, solver.pyramid_layers(32, 4, 0.5), "tflops", 9.4646, [8, 16, 24]),
        (LLAVA, solver.one_shot_layer(32, 0.5), "avg_tokens", 306, 2),
        (LLAVA, EVEN, "kv_mb", 141.557760, 0.5),
    ],
)
def test_known_schedules_are_found_again(workload, family, target, value, solved) -> None:
    solution = solver.solve(workload, family, target, value)
    name, found = solution.solved
    assert name == family.name
    if isinstance(found, float):
        counts = workload.lengths(family.build(solved))
        assert workload.lengths(solution.schedule) == counts
        assert found == pytest.approx(solved, abs=2e-3)
        assert len(str(found)) <= len("0.1234567")  # the shortest that does it
    else:
        assert found == solved


@settings(max_examples=40, deadline=None)
@given(
    num_visual=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 31), min_size=1, max_size=4, unique=True).map(sorted),
    rounding=st.sampled_from(["floor", "nearest"]),
    share=st.floats(0, 1),
    target=st.sampled_from(solver.TARGETS),
    convention=st.sampled_from(cost.CONVENTIONS),
)
def test_nothing_in_the_family_is_nearer(
    num_visual, cuts, rounding, share, target, convention
) -> None:
    workload = Workload(LLAVA.shape, num_visual, num_text=3, strategy=PDROP)
    families: list[solver.Dial] = [
        solver.pyramid(cuts, rounding),
        solver.one_shot(cuts[0], rounding),
    ]
    for family in families:
        low, high = (
            workload.figure(family.build(end), target, convention) for end in (family.least, 1.0)
        )
        value = low + share * (high - low)
        solution = solver.solve(workload, family, target, value, convention)
        assert solution.possible == (low, high)
        assert solution.got == workload.figure(solution.schedule, target, convention)
        off = abs(solution.got - value)
        for step in range(1, 200):
            other = workload.figure(family.build(step / 199), target, convention)
            assert off <= abs(other - value) + 1e-9 * max(1.0, high)


@pytest.mark.parametrize(("cuts", "values"), [(2, (170, 200, 250, 300)), (3, (262,))])
def test_open_layers_are_even_among_those_that_fit(cuts, values) -> None:
    family = solver.pyramid_layers(12, cuts + 1, 0.5, first_layer=2)
    workload = Workload(cost.DecoderShape(12, 64, 96, 4, 2, 16, 77), 400)
    found = {
        layers: workload.figure(family.build(layers), "avg_tokens", "pyramiddrop")
        for layers in itertools.combinations(range(2, 12), cuts)
    }
    for value in values:
        solution = solver.solve(workload, family, "avg_tokens", value)
        best = min(abs(figure - value) for figure in found.values())
        assert abs(solution.got - value) <= max(best, 0.005 * value)
        own = tuple(solution.solved[1])
        even = [
            sum(b - a > 0 and (b - a) ** 2 for a, b in itertools.pairwise((0, *layers, 12)))
            for layers in (own, *(k for k, f in found.items() if abs(f - value) <= best))
        ]
        assert even[0] == min(even)


def test_real_counts_are_reported() -> None:
    """Seven visual tokens do not reach every average: what is told is what they give."""
    workload = Workload(LLAVA.shape, 7)
    solution = solver.solve(workload, EVEN, "avg_tokens", 3.1)
    figures = solution.figures
    assert figures.lengths == tuple(solution.schedule.lengths(32, 7))
    assert solution.got == figures.avg_tokens == sum(figures.lengths) / 32 != 3.1
    assert figures.tflops["pyramiddrop"] == cost.flops(LLAVA.shape, figures.lengths) / 1e12
    assert figures.flops_ratio["fastv"] == pytest.approx(
        cost.flops(LLAVA.shape, figures.lengths, convention="fastv")
        / cost.flops(LLAVA.shape, [7] * 32, convention="fastv")
    )
    assert figures.kv_mb * 1e6 == cost.kv_bytes(LLAVA.shape, figures.lengths)
    assert figures.avg_tokens_outputs == cost.average_tokens(figures.lengths, "outputs")


def test_exact_budgets_count_the_scoring() -> None:
    workload = Workload(LLAVA.shape, 576, num_text=30, strategy=PDROP)
    lengths = workload.lengths(EVEN.build(0.5))
    terms = cost.exact(LLAVA.shape, lengths, 30, cuts=(8, 16, 24), strategy=PDROP)
    total = workload.flops(EVEN.build(0.5), "exact")
    assert total == pytest.approx(terms.layers + terms.scoring, rel=1e-12)
    assert terms.scoring > 0
    blind = Workload(LLAVA.shape, 576, num_text=30)
    assert blind.flops(EVEN.build(0.5), "exact") == pytest.approx(terms.layers, rel=1e-12)


@pytest.mark.parametrize(
    ("solve", "message"),
    [
        (lambda: solver.solve(LLAVA, EVEN, "avg_tokens", 128), "expected 144 to 576.*got 128"),
        (
            lambda: solver.solve(LLAVA, EVEN, "tflops", 4),
            r"budget.tflops: expected 0.9543 to 3.817",
        ),
        (lambda: solver.solve(LLAVA, EVEN, "final_tokens", 577), "expected 0 to 576"),
        (
            lambda: solver.solve(LLAVA, solver.pyramid_layers(32, 4, 0.5), "avg_tokens", 64),
            "expected 96.75 to 537.8, which is what these stages can give, got 64. Move the cuts",
        ),
        (
            lambda: solver.solve(LLAVA, solver.pyramid_layers(80, 9, 0.5), "avg_tokens", 64),
            "expected at most 500000 ways",
        ),
        (
            lambda: solver.solve(LLAVA, solver.pyramid_layers(2, 4, 0.5), "kv_mb", 64),
            "Choose fewer",
        ),
        (lambda: solver.solve(LLAVA, EVEN, "avg_tokens", "many"), "expected a number, got 'many'"),
        (lambda: solver.solve(LLAVA, EVEN, "avg_tokens", float("nan")), "a number, got nan"),
        (lambda: solver.solve(LLAVA, EVEN, "avg_token", 1), "Did you mean 'avg_tokens'"),
        (lambda: solver.solve(LLAVA, EVEN, "tflops", 1, "exat"), "Did you mean 'exact'"),
        (lambda: Workload(LLAVA.shape, 0), "budget.num_visual: expected an integer >= 1"),
        (lambda: Workload(LLAVA.shape, 9, dtype="half"), "cost.dtype: expected one of"),
        (lambda: budgets.asked({"tflops": 1, "kv_mb": 1}), "expected one target, got"),
    ],
)
def test_what_cannot_be_met_says_what_can(solve, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        solve()


# --------------------------------------------------------------------------------------- in configs


@pytest.mark.parametrize(
    ("overrides", "schedule"),
    [
        (["budget.avg_tokens=270"], tp.Schedule.pyramid(layers=[8, 16, 24], lam=0.5)),
        (["strategy=fastv", "budget.avg_tokens=306"], tp.Schedule.one_shot(2, 0.5)),
        (
            ["schedule.layers=[2,6,15]", "budget.solve=layers", "budget.avg_tokens=270"],
            tp.Schedule.pyramid(layers=[8, 16, 24], lam=0.5),
        ),
        (
            ["strategy=fastv", "budget.solve=layer", "budget.avg_tokens=306"],
            tp.Schedule.one_shot(2, 0.5),
        ),
        (
            ["model=llava_next_7b", "budget.tflops=9.4646"],
            tp.Schedule.pyramid(layers=[8, 16, 24], lam=0.5),
        ),
        (
            ["budget.num_visual=2880", "budget.flops_ratio=0.5", "budget.convention=exact"],
            None,
        ),
    ],
)
def test_a_config_is_solved(overrides: list[str], schedule: tp.Schedule | None) -> None:
    config = compose("eval", ["model=llava_1_5_7b", *overrides])
    pruning = build_pruning(config, 32)
    assert pruning is not None
    assert pruning.solution is not None
    if schedule is None:
        assert pruning.solution.got == pytest.approx(0.5, rel=1e-3)
        assert pruning.solution.workload.strategy == PDROP
    else:
        workload = pruning.solution.workload
        assert workload.lengths(pruning.schedule) == workload.lengths(schedule)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.avg_tokens=100"], "budget.avg_tokens: expected 144 to 576"),
        (["schedule=explicit", "budget.avg_tokens=100"], "one that names every cut itself"),
        (["budget.avg_tokens=200", "budget.solve=keep"], r"expected one of \['lam', 'layers'\]"),
        (["budget.avg_tokens=200", "budget.solve=layers", "budget.first_layer=40"], "from 0 to 31"),
        (["model.path=Qwen/Qwen2-VL-7B-Instruct", "budget.kv_mb=9"], "Set budget.num_visual=1280"),
    ],
)
def test_a_config_that_cannot_be_solved(overrides: list[str], message: str) -> None:
    config = compose("train", ["model=llava_1_5_7b", *overrides])
    with pytest.raises(ValueError, match=message):
        build_pruning(config, 32)


def test_a_run_is_refused_before_it_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "budget.avg_tokens=20"]) == 2
    assert "budget.avg_tokens: expected 36 to 144" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- sizes of models


def test_the_shipped_model_is_read_without_transformers_as_with_it() -> None:
    config = load_config("tiny")
    read = (cost.DecoderShape.from_config(config), cost.visual_tokens(config))
    assert budgets.read_model("tiny") == read


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"model_type": "llava"}, 576),
        (
            {
                "model_type": "llava_next",
                "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336]],
            },
            2880,
        ),
        (
            {
                "model_type": "llava_onevision",
                "image_grid_pinpoints": [[384, 384], [2304, 2304]],
                "vision_aspect_ratio": "anyres_max_9",
            },
            7290,
        ),
        ({"model_type": "qwen2_5_vl"}, None),
        ({"model_type": "gemma3"}, 256),
        ({"model_type": "internvl"}, 256),
        (
            {"model_type": "idefics3", "vision_config": {"image_size": 364, "patch_size": 14}},
            169,
        ),
    ],
)
def test_visual_tokens_of_a_config(config: dict, tokens: int | None) -> None:
    from transformers import AutoConfig

    assert cost.visual_tokens(AutoConfig.for_model(**config)) == tokens


# --------------------------------------------------------------------------------- docs/budgets.md

FAMILIES = {
    "λ, even cuts": ("schedule=pyramid", solver.pyramid([8, 16, 24])),
    "λ, cuts at 2, 6, 15": (
        "schedule=pyramid schedule.layers=[2,6,15]",
        solver.pyramid([2, 6, 15]),
    ),
    "λ, cuts at 1, 2, 3": ("schedule=pyramid schedule.layers=[1,2,3]", solver.pyramid([1, 2, 3])),
    "keep, one cut at 2": ("schedule=one_shot", solver.one_shot(2)),
    "keep, one cut at 3": ("schedule=one_shot schedule.layer=3", solver.one_shot(3)),
    "layers, λ = 0.5": ("schedule=pyramid", solver.pyramid_layers(32, 4, 0.5)),
    "layers, λ = 0.3": ("schedule=pyramid schedule.lam=0.3", solver.pyramid_layers(32, 4, 0.3)),
    "layer, keep = 0.1": ("schedule=one_shot schedule.keep=0.1", solver.one_shot_layer(32, 0.1)),
}
MODELS = {"LLaVA-1.5-7B": (LLAVA, (192, 128, 64)), "LLaVA-NeXT-7B": (NEXT, (640, 320, 160))}


def stages(lengths: tuple[int, ...]) -> str:
    return ", ".join(f"{n} × {len(list(own))}" for n, own in itertools.groupby(lengths))


def figures_of(figures: Figures) -> str:
    tera = " / ".join(f"{figures.tflops[c]:.3g}" for c in cost.CONVENTIONS)
    return (
        f"{stages(figures.lengths)} | {figures.avg_tokens:.2f} | {figures.avg_tokens_outputs:.2f} "
        f"| {figures.final_tokens} | {tera} | {figures.kv_mb:.1f}"
    )


def budget_table(workload: Workload, values: tuple[int, ...]) -> list[str]:
    """A row per budget and family; an impossible budget says what is possible."""
    columns = "tokens × layers | inputs | outputs | last | TFLOPs | KV MB"
    lines = [f"| average | open | add to the command | {columns} |", f"|{' --- |' * 9}"]
    for value, (name, (overrides, family)) in itertools.product(values, FAMILIES.items()):
        try:
            solution = solver.solve(workload, family, "avg_tokens", value)
        except ValueError as error:
            (reach,) = re.findall(r"expected (\S+ to [^,\s]+),", str(error))
            lines.append(f"| {value} | {name} | impossible: {reach} |" + " |" * 6)
            continue
        key, found = solution.solved
        text = f"`{overrides} schedule.{key}={found}`".replace(", ", ",")
        if " schedule.layers=" in overrides and key == "layers":
            raise AssertionError("layers are given twice")
        lines.append(f"| {value} | {name} | {text} | {figures_of(solution.figures)} |")
    return lines


def strategy_table() -> list[str]:
    """What each strategy's published schedule gives, and the share that its scoring takes."""
    columns = "tokens × layers | inputs | outputs | last | TFLOPs | KV MB | scoring"
    lines = [f"| strategy | model | {columns} |", f"|{' --- |' * 9}"]
    models = {
        "LLaVA-1.5-7B": LLAVA,
        "LLaVA-1.5-13B": Workload(cost.DecoderShape.preset("llava-1.5-13b"), 576),
        "LLaVA-NeXT-7B": NEXT,
    }
    for name, (model, plain) in itertools.product(tp.available(), models.items()):
        strategy, schedule, _ = tp.published(name, num_layers=plain.shape.num_layers)
        workload = Workload(plain.shape, plain.num_visual, strategy=strategy)
        total = workload.flops(schedule, "exact")
        share = 100 * (total - plain.flops(schedule, "exact")) / total
        most = "" if strategy.keeps_exactly else "at most "
        figures = figures_of(workload.figures(schedule))
        lines.append(f"| `{name}` | {model} | {most}{figures} | {share:.2f} % |")
    return lines


def stages_override(*stages: tuple[int, float]) -> str:
    cuts = ",".join(f"{{layer:{layer},keep:{keep}}}" for layer, keep in stages)
    return f"schedule.stages=[{cuts}]"


def lists(*keeps: float) -> str:
    """SparseVLM's cuts."""
    return stages_override(*zip((3, 7, 16), keeps, strict=True))


#: Method, model, the paper's budget, the average that it means, and how it is asked for.
PRINTED = [
    *(
        ("fastv", "LLaVA-1.5-7B", budget, "avg_tokens", f"schedule.keep={keep}")
        for budget, keep in ((192, 0.288), (128, 0.17), (64, 0.052))
    ),
    *(
        ("sparsevlm", "LLaVA-1.5-7B", budget, "avg_tokens_outputs", lists(*keeps))
        for budget, keeps in (
            (192, (0.5365, 0.3542, 0.1962)),
            (128, (0.5417, 0.2031, 0.0677)),
            (96, (0.4323, 0.0955, 0.0469)),
            (64, (0.1424, 0.0556, 0.0313)),
        )
    ),
    *(
        (
            "sparsevlm",
            "LLaVA-1.5-7B",
            budget,
            "avg_tokens_outputs",
            f"strategy.version=2.0 positions=original {lists(*keeps)}",
        )
        for budget, keeps in (
            (192, (0.5208, 0.3472, 0.2049)),
            (128, (0.4132, 0.1875, 0.1042)),
            (96, (0.4271, 0.0938, 0.0486)),
            (64, (0.1146, 0.059, 0.0347)),
        )
    ),
    *(
        ("vscan", "LLaVA-1.5-7B", budget, "avg_tokens", stages_override((0, first), (16, second)))
        for budget, first, second in (
            (192, 0.5, 0.1667),
            (128, 0.3333, 0.1111),
            (64, 0.1667, 0.0556),
        )
    ),
    *(
        (name, "LLaVA-1.5-7B", budget, "final_tokens", f"schedule.keep={keep}")
        for name, budgets_of in (
            ("visionzip", ((192, 0.3333), (128, 0.2222), (64, 0.1111))),
            ("cdpruner", ((192, 0.3333), (128, 0.2222), (64, 0.1111))),
            ("vispruner", ((128, 0.2222), (64, 0.1111), (32, 0.0556))),
            ("fastervlm", ((144, 0.25), (58, 0.1), (29, 0.05))),
            ("divprune", ((56, 0.098),)),
            ("hiprune", ((192, 0.3333), (128, 0.2222), (64, 0.1111))),
            ("holov", ((64, 0.1111),)),
            ("priortr", ((192, 0.3333), (128, 0.2222), (64, 0.1111))),
            # 192, 128 and 64 by name: an eighth of it for each of eight pivots, and four pivots.
            ("dart", ((196, 0.3403), (132, 0.2292), (68, 0.1181))),
            # Outliers aside: the averages that the paper prints.
            ("prumerge", ((32, "0.0556 strategy.count=schedule"),)),
            ("prumerge_plus", ((144, "0.25 strategy.count=schedule"),)),
        )
        for budget, keep in budgets_of
    ),
    ("pyramiddrop", "LLaVA-1.5-7B", 270, "avg_tokens", "schedule.lam=0.5"),
    ("pyramiddrop", "LLaVA-NeXT-7B", 1350, "avg_tokens", "schedule.lam=0.5"),
    ("divprune", "LLaVA-NeXT-7B", 0.098, "final_tokens", "schedule.keep=0.098"),
    ("dart", "LLaVA-NeXT-7B", 324, "final_tokens", "schedule.keep=0.1125"),
    *(  # tile by tile: 128, 64 or 32 of each of five
        ("visionzip", "LLaVA-NeXT-7B", budget, "final_tokens", f"schedule.keep={keep}")
        for budget, keep in ((640, 0.2222), (320, 0.1111), (160, 0.0556))
    ),
    ("priortr", "LLaVA-NeXT-7B", 320, "final_tokens", "strategy.queries=last"),
    *(
        (
            "hiprune",
            "Qwen2.5-VL-7B",
            share,
            "final_tokens",
            f"strategy.middle=15 strategy.layer=-1 schedule.keep={share}",
        )
        for share in (0.334, 0.223, 0.112)
    ),
    (
        "mmtok",
        "Qwen2.5-VL-7B",
        0.2,
        "final_tokens",
        "strategy.text_temperature=0.01 strategy.layer=-1 schedule.keep=0.2",
    ),
    ("vidcom2", "LLaVA-OneVision-7B", 0.25, "final_tokens", "schedule.keep=0.25"),
    (
        "vscan",
        "Qwen2.5-VL-7B",
        0.1113,
        "avg_tokens",
        f"schedule.of_layers=28 {stages_override((0, 0.167), (14, 0.0556))}",
    ),
]
QWEN = Workload(cost.DecoderShape(28, 3584, 18944, 28, 4, 128, 152064), 1296)
ONE_VISION = Workload(QWEN.shape, 32 * 196)
PRINTED_ON = {
    "LLaVA-1.5-7B": LLAVA,
    "LLaVA-NeXT-7B": NEXT,
    "LLaVA-OneVision-7B": ONE_VISION,
    "Qwen2.5-VL-7B": QWEN,
}
#: Budgets of methods that are not here: method, year and arXiv id, model, budgets as shares of the
#: tokens that enter the decoder, and of those the share that is left from some layer on.
PRINTED_ELSEWHERE = [
    ("HiRED", "LLaVA-NeXT-7B", (0.2,), None),
    ("VisionSelector (2025, 2510.16598)", "Qwen2.5-VL-7B", (0.3, 0.2, 0.1), None),
    ("IDPruner (2026, 2602.13315)", "Qwen2.5-VL-7B", (0.25, 0.1), None),
    ("FastVID", "LLaVA-OneVision-7B", (0.1,), None),
    ("HoliTom", "LLaVA-OneVision-7B", (0.2,), (18, 0.5)),
]
#: First words of models' files for which no paper that we know prints any.
NOT_PRINTED = {"qwen3", "internvl3", "gemma3", "smolvlm2"}
AVERAGES = {"avg_tokens": "inputs", "avg_tokens_outputs": "outputs", "final_tokens": "last"}


@cache
def printed_figures(name: str, model: str, overrides: str) -> Figures:
    """What a documented command's schedule gives."""
    workload = PRINTED_ON[model]
    config = compose("eval", [f"strategy={name}", *overrides.split()])
    pruning = build_pruning(config, workload.shape.num_layers)
    assert pruning is not None
    return workload.figures(pruning.schedule)


def printed_table() -> list[str]:
    """What papers call a budget, and the command that asks for it."""
    columns = "paper | counted as | add to the command | tokens × layers | inputs | outputs | last"
    lines = [f"| strategy | model | {columns} |", f"|{' --- |' * 9}"]
    for name, model, budget, average, overrides in PRINTED:
        figures = printed_figures(name, model, overrides)
        share = f"{100 * budget:.1f} %" if budget < 1 else f"{budget:g}"
        lines.append(
            f"| `{name}` | {model} | {share} | {AVERAGES[average]} | `{overrides}` "
            f"| {stages(figures.lengths)} | {figures.avg_tokens:.2f} "
            f"| {figures.avg_tokens_outputs:.2f} | {figures.final_tokens} |"
        )
    return lines


def elsewhere_table() -> list[str]:
    """Budgets of methods that are not here, and the schedule that has them."""
    columns = "share | add to the command | tokens × layers | inputs | outputs | last"
    lines = [f"| method | model | {columns} |", f"|{' --- |' * 8}"]
    for method, model, shares, later in PRINTED_ELSEWHERE:
        for share in shares:
            cuts = [(0, share)] if later is None else [(0, share), (later[0], share * later[1])]
            overrides = f"schedule=explicit {stages_override(*cuts)}"
            figures = printed_figures("random", model, overrides)
            lines.append(
                f"| {method} | {model} | {100 * share:g} % | `{overrides}` "
                f"| {stages(figures.lengths)} | {figures.avg_tokens:.2f} "
                f"| {figures.avg_tokens_outputs:.2f} | {figures.final_tokens} |"
            )
    return lines


def document() -> str:
    parts = [
        "# Which configuration gives budget X?",
        "",
        "<!-- Generated: python tests/cost/test_budget.py -->",
        "",
        "Any strategy takes any of these schedules: which tokens stay does not change how many. To",
        "solve a budget of your own, name one target; what the schedule leaves open follows:",
        "",
        "```bash",
        "tokenprune flops model=llava_1_5_7b strategy=pyramiddrop budget.avg_tokens=192",
        "tokenprune flops model=llava_next_7b strategy=fastv budget.tflops=9.5",
        "tokenprune eval model=llava_1_5_7b strategy=fastv budget.solve=layer budget.kv_mb=200",
        "```",
        "",
        "`tokenprune flops` needs no weights; `--csv` prints its layers in full, `shape=...` takes",
        "the shapes of `tokenprune bench`. Targets: `avg_tokens` (mean over what the layers are",
        "given: FastV, PyramidDrop, VScan), `avg_tokens_outputs` (mean over what they leave:",
        "SparseVLM's code), `final_tokens`, `tflops`, `flops_ratio`, `kv_mb`; see",
        "[configs/budget/default.yaml](../configs/budget/default.yaml).",
        "",
        "* Token counts are integers: the figures are those of the real counts, the nearest that",
        "  the family reaches. Open layers are spread evenly within 0.5 % of the target.",
        "* TFLOPs are of the visual tokens in the decoder: as PyramidDrop / as FastV count / exact",
        "  (two per multiply-add, causal attention counted as half; the last table adds scoring).",
        "  Papers print the first two, which are multiply-adds. KV is in 10⁶ bytes, two per value.",
        "* The same average is not the same cost: the tables of one paper mix both averages.",
        "* PyramidDrop's even cuts leave the first 8 of 32 layers whole, a quarter of all tokens:",
        "  smaller budgets need earlier cuts. The paper does not say which it used for them.",
        "* LLaVA-NeXT's 2 880 leaves out the newline tokens, at most 48 (budget.num_visual=2928).",
        "* 160 of 2 880 is less than two whole layers: published numbers of that kind average",
        "  layer outputs (`budget.avg_tokens_outputs=160`), or prune before the decoder.",
    ]
    for model, (workload, values) in MODELS.items():
        budgets = "/".join(map(str, values))
        parts += ["", f"## {model}: {budgets} of {workload.num_visual}", ""]
        parts += budget_table(workload, values)
    parts += [
        "",
        "## What the published schedules give",
        "",
        "Scoring is the strategy's share of the exact FLOPs: rows of queries, keys of all tokens.",
        "What a method computes besides is not in it: for n tokens of width d, the cosines of all",
        "pairs (`divprune`, `cdpruner`; within a tile `scope`, `mmtok`) are 2n²d, those to eight",
        "pivots (`dart`) 16nd; a pick of `scope` or `mmtok` then looks at n² numbers.",
        "At most: shares do not come out even (`dart`, `vscan`), or the image decides: PruMerge's",
        "paper 32 and, at even distances, 144 of 576 stay on average. Results and the bench count",
        "what was kept.",
        "",
        *strategy_table(),
        "",
        "## Budgets that papers print",
        "",
        "What a paper calls its budget, as it counts it: the mean over what layers are given",
        "(inputs), over what they leave (outputs), or what is left in the end (last). Add the",
        "third to last to `tokenprune eval model=llava_1_5_7b strategy=...`, with a shell's quotes",
        "around lists. SparseVLM's version 1.0 has no counts: `strategy.version=1.0",
        "schedule=sparsevlm_1` with `strategy.scale` and `strategy.bias` of 13.5 and 0 for 192, 9",
        "and 6 for 128, .8 and 0 for 64 of 576, by the rank of attention. DART's 192, 128 and 64",
        "are 196, 132 and 68 with four pivots. PyramidDrop's table of 192, 128 and 64 does not say",
        "by which cuts. Qwen's count of tokens follows the image: here 1 296.",
        "",
        *printed_table(),
        "",
        "Methods that are not here print others, as shares of the tokens that enter the decoder;",
        "HoliTom halves its own at layer 18. VisionSelector and IDPruner name a Qwen-VL, not",
        "always which, and so does MMTok. Any strategy takes their schedules. A video is 32 frames",
        "of 196 tokens here.",
        "",
        *elsewhere_table(),
        "",
        "No budget is known to us that a paper prints for Qwen3-VL-8B, InternVL3-8B, Gemma 3 4B",
        "or SmolVLM2-2.2B, and none for photos on LLaVA-OneVision. Shares of the tokens, as those",
        "above, mean the same there; counts such as 192 of 576 do not: say what they are of.",
    ]
    return "\n".join(parts) + "\n"


@pytest.mark.matrix
def test_document_is_current() -> None:
    """To renew it: python tests/cost/test_budget.py."""
    assert DOC.read_text() == document()


@pytest.mark.parametrize(
    ("name", "model", "budget", "average", "overrides"),
    PRINTED,
    ids=[f"{name}-{budget}" for name, _, budget, *_ in PRINTED],
)
@pytest.mark.share(3)
def test_printed_budgets_are_met(name, model, budget, average, overrides) -> None:
    figures = printed_figures(name, model, overrides)
    got = getattr(figures, average) / (PRINTED_ON[model].num_visual if budget < 1 else 1)
    # Averages that are called by a round number are up to a token off it.
    assert got == pytest.approx(budget, abs=1 if average != "final_tokens" else 0, rel=5e-3)


def test_every_model_points_to_its_budgets() -> None:
    """A model's file names the page, and the page names the model."""
    page = DOC.read_text()
    models = sorted((DOC.parent.parent / "configs" / "model").glob("*_[0-9]*b.yaml"))
    assert len(models) == 8
    for path in models:
        text = path.read_text()
        assert "# Budgets that papers print for it" in text
        assert "docs/budgets.md" in text
        assert ("none that docs" in text) == (path.stem.split("_")[0] in NOT_PRINTED)
    for name in ("Qwen3-VL-8B", "InternVL3-8B", "Gemma 3 4B", "SmolVLM2-2.2B", *PRINTED_ON):
        assert name in page


def test_documented_commands_can_be_met() -> None:
    readme = (DOC.parent.parent / "README.md").read_text()
    commands = re.findall(r"tokenprune \w+ ([^`\n]*budget\.[^`\n]*)", DOC.read_text() + readme)
    assert len(commands) >= 4
    for overrides in commands:
        pruning = build_pruning(compose("eval", overrides.split()), 32)
        assert pruning is not None
        assert pruning.solution is not None


def test_documented_schedules_are_those_of_their_configs() -> None:
    rows = re.findall(r"^\| (\d+) \| \S.*? \| `(.*?)` \| (.*?) \|", DOC.read_text(), re.MULTILINE)
    assert len(rows) > 30
    for value, overrides, counts in rows[::9]:
        model = "llava_1_5_7b" if int(value) < 160 or value == "192" else "llava_next_7b"
        pruning = build_pruning(compose("eval", [f"model={model}", *overrides.split()]), 32)
        assert pruning is not None
        workload = LLAVA if model == "llava_1_5_7b" else NEXT
        assert stages(workload.lengths(pruning.schedule)) == counts


if __name__ == "__main__":
    DOC.write_text(document())
