"""Which runs are compared with which, and what is written and said of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run, methods_in
from omegaconf import OmegaConf

from tokenprune.runs import comparisons, difficulty
from tokenprune.runs.comparisons import compare_methods
from tokenprune.runs.difficulty import split_by_difficulty
from tokenprune.runs.paired import compare
from tokenprune.runs.proportions import wilson
from tokenprune.runs.sweeps import check_baseline
from tokenprune.runs.tabulation import finish_sweep, listed

NUM = 60


def answers(share: float, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(NUM) < share).astype(float).tolist()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Unpruned, three strategies at two budgets, `random` with two seeds, smaller pictures."""
    make_run(tmp_path, "none", [1.0] * (NUM - 2) + [0.0, 0.0])
    for number, keep in enumerate((0.5, 0.1)):
        for name, share in (("fastv", 0.9), ("pool", 0.7)):
            scores = answers(share - 0.4 * number, 10 + number)
            make_run(tmp_path, f"{name}-{keep}", scores, strategy=name, keep=keep)
        for seed in (0, 1):
            scores = answers(0.6 - 0.3 * number, 20 + seed + 2 * number)
            own = {"strategy": "random", "keep": keep, "seed": seed}
            make_run(tmp_path, f"random-{keep}-{seed}", scores, **own)
    for scale, right in ((0.5, 50), (0.2, 30)):
        scores = [1.0] * right + [0.0] * (NUM - right)
        make_run(tmp_path, f"small-{scale}", scores, strategy="downsample", image_scale=scale)
    return tmp_path


def pairs(rows: list[dict[str, Any]], against: str) -> list[tuple[str, str, str]]:
    return [(r["method"], r["keeps"], r["against_run"]) for r in rows if r["against"] == against]


def test_each_is_compared_with_the_unpruned_model_and_with_random_at_its_budget(
    sweep: Path,
) -> None:
    rows, missing = compare_methods(methods_in(sweep))
    assert missing == []
    others = [("fastv", "0.1"), ("fastv", "0.5"), ("pool", "0.1"), ("pool", "0.5")]
    random = [("random", "0.1"), ("random", "0.5")]
    small = [("downsample", ""), ("downsample", "")]
    assert sorted(pairs(rows, "unpruned")) == sorted(
        (*own, "none") for own in (*others, *random, *small)
    )
    assert sorted(pairs(rows, "random")) == sorted((*o, f"random-{o[1]}-0") for o in others)
    assert {row["num_compared"] for row in rows if row["against"] == "unpruned"} == {8}
    assert {row["num_compared"] for row in rows if row["against"] == "random"} == {4}
    # With what leaves as few tokens and looks at none, where it is there.
    pooled = [own for own in (*others, *random) if own[0] != "pool"]
    assert sorted(pairs(rows, "pool")) == sorted((*o, f"pool-{o[1]}") for o in pooled)
    shrunk = {"0.1": "small-0.2", "0.5": "small-0.5"}
    assert sorted(pairs(rows, "downsample")) == sorted(
        (*own, shrunk[own[1]]) for own in (*others, *random)
    )
    row = next(
        r for r in rows if (r["method"], r["keeps"], r["against"]) == ("fastv", "0.1", "random")
    )
    found = compare([answers(0.5, 11)], [answers(0.3, 22), answers(0.3, 23)])
    assert (row["num_seeds"], row["against_seeds"], row["num_questions"]) == (1, 2, NUM)
    assert (row["difference"], row["p"], row["wins"]) == (found.value, found.p, found.wins)
    assert (row["ci_low"], row["ci_high"]) == found.interval()
    assert row["p_holm"] >= row["p"]
    assert row["holm_low"] <= row["ci_low"] <= row["ci_high"] <= row["holm_high"]


def test_questions_about_one_image_are_taken_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with runs of before their images were marked; what they share decides."""
    scores = {"none": answers(0.9, 0), "fastv": answers(0.6, 1)}
    pictures = [f"{index // 3}" for index in range(NUM)]
    for name, own in scores.items():
        keep = 0.5 if name == "fastv" else None
        marks = pictures if name == "fastv" else None
        make_run(tmp_path, name, own, strategy=name, keep=keep, pictures=marks)
    methods = methods_in(tmp_path)
    rows, _ = compare_methods(methods)
    ids = sorted(range(NUM), key=str)  # the order in which they are compared
    found = compare(
        *([[own[index] for index in ids]] for own in (scores["fastv"], scores["none"])),
        [pictures[index] for index in ids],
    )
    (row,) = rows
    assert (row["test"], row["num_images"], row["p"]) == ("permutation by image", 20, found.p)
    assert (row["ci_low"], row["ci_high"]) == found.interval()
    assert comparisons.difference_of(methods[0], methods[1]) == found
    finish_sweep(tmp_path)
    assert "question by question (by image, where one has several)" in capsys.readouterr().out
    # One image a question, or none known: as ever.
    for marks in ([str(index) for index in range(NUM)], None):
        own = {"strategy": "fastv", "keep": 0.5}
        make_run(tmp_path, "fastv", scores["fastv"], **own, pictures=marks)
        (row,) = compare_methods(methods_in(tmp_path))[0]
        assert (row["test"], row["num_images"]) == ("mcnemar", "")


def test_baselines_are_strategies_at_the_same_cuts_or_runs(sweep: Path) -> None:
    methods = methods_in(sweep)
    rows, missing = compare_methods(methods, ["pool", "pool-0.1", "downsample"])
    expected = [("fastv", "pool"), ("random", "pool")]
    expected = [
        (name, keep, f"{pool}-{keep}") for name, pool in expected for keep in ("0.1", "0.5")
    ]
    assert sorted(pairs(rows, "pool")) == expected
    assert missing == []
    make_run(sweep, "late", answers(0.5, 1), strategy="fastv", keep=0.5, layer=3)
    assert compare_methods(methods_in(sweep))[1] == []  # nobody has asked for it
    _, missing = compare_methods(methods_in(sweep), ["pool"])
    assert missing == ["Not compared with pool, which has no run at their cuts: fastv."]
    # A run, whatever its budget, but itself.
    assert len(pairs(rows, "pool-0.1")) == len(methods) - 1
    # The nearest picture: of a tenth of the tokens, that of a fifth of the pixels.
    nearest = {keep: run for _, keep, run in pairs(rows, "downsample")}
    assert nearest == {"0.5": "small-0.5", "0.1": "small-0.2"}
    with pytest.raises(ValueError, match=r"baseline: expected a strategy or a run .* got 'fast'\."):
        comparisons.check_baselines(methods, ["fast"])


def test_of_two_position_policies_the_same_is_compared(tmp_path: Path) -> None:
    for positions in ("original", "renumbered"):
        for name in ("fastv", "random"):
            own = {"strategy": name, "keep": 0.5, "positions": positions}
            make_run(tmp_path, f"{name}-{positions}", answers(0.5, len(name)), **own)
    rows, _ = compare_methods(methods_in(tmp_path))
    found = {(row["method"], row["against_run"]) for row in rows}
    assert found == {(f"fastv ({p})", f"random-{p}") for p in ("original", "renumbered")}


def test_benchmarks_of_several_tasks_are_compared_task_by_task(tmp_path: Path) -> None:
    """Their accuracy is a mean over tasks, or a score of another sort, not over the questions."""
    kinds = ["pope", "pope", "mme"]
    scores = {"none": answers(0.95, 0), "fastv": answers(0.5, 1), "small": answers(0.7, 2)}
    for name, own in scores.items():
        keep = 0.5 if name == "fastv" else None
        strategy = "downsample" if name == "small" else name
        scale = 0.5 if name == "small" else 1.0
        make_run(
            tmp_path, name, own, strategy=strategy, keep=keep, image_scale=scale, kinds=kinds,
            accuracy=0.123,
        )  # fmt: skip
    rows, _ = compare_methods(methods_in(tmp_path))
    whole = [row for row in rows if row["against"] == "unpruned"]
    own = {(row["method"], row["questions"]): row for row in whole}
    assert set(own) == {(m, k) for m in ("fastv", "downsample") for k in ("pope", "mme")}
    assert {row["num_compared"] for row in whole} == {4}
    parts = {"mme": slice(2, None, 3)}
    found = compare([scores["fastv"][parts["mme"]]], [scores["none"][parts["mme"]]])
    mme = own["fastv", "mme"]
    assert (mme["num_questions"], mme["difference"]) == (NUM // 3, found.value)
    split, _ = split_by_difficulty(methods_in(tmp_path))
    assert [(row["method"], row["questions"]) for row in split] == [
        (method, kind) for method in ("fastv", "downsample") for kind in ("pope", "mme")
    ]
    assert all(r["num_wrong"] + r["num_easy"] + r["num_hard"] == r["num_questions"] for r in split)
    # The same where the accuracy is that mean: all together.
    plain = tmp_path / "plain"
    for name in ("none", "fastv"):
        keep = 0.5 if name == "fastv" else None
        make_run(plain, name, scores[name], strategy=name, keep=keep, kinds=kinds)
    assert [row["questions"] for row in compare_methods(methods_in(plain))[0]] == ["all"]


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"model": {"path": "another"}}},
        {"config": {"metric": "vqa"}},
        {"versions": {"data.path": "1"}},
        {"asked": "why?"},
    ],
)
def test_other_models_data_and_questions_are_never_compared(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    make_run(tmp_path, "none", answers(0.9, 0))
    make_run(tmp_path, "fastv", answers(0.5, 1), strategy="fastv", keep=0.5, **other)
    rows, missing = compare_methods(methods_in(tmp_path))
    assert rows == []
    told = ["Not compared, for they were asked different questions: fastv with unpruned."]
    assert missing == (told if "asked" in other else [])


def test_rows_of_two_commits_are_named_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"data": {"path": "owner/name"}}
    for name, commit in (("none", "a" * 40), ("fastv", "b" * 40)):
        keep = None if name == "none" else 0.5
        versions = {"data.path": commit}
        make_run(tmp_path, name, answers(0.5, 1), strategy=name, keep=keep, config=data,
                 versions=versions)  # fmt: skip
    finish_sweep(tmp_path)
    said = capsys.readouterr().out
    assert (
        "data.path: owner/name had other contents for some runs: bbbbbbbb (1), aaaaaaaa (1)" in said
    )
    assert not (tmp_path / "comparisons.csv").exists()


def test_the_order_of_questions_does_not_matter(tmp_path: Path) -> None:
    make_run(tmp_path, "none", answers(0.9, 0))
    make_run(tmp_path, "fastv", answers(0.5, 1), strategy="fastv", keep=0.5)
    before = compare_methods(methods_in(tmp_path))[0]
    path = tmp_path / "fastv" / "predictions.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert compare_methods(methods_in(tmp_path))[0] == before


def test_a_budget_that_was_asked_for_is_no_other_setting(tmp_path: Path) -> None:
    make_run(tmp_path, "none", answers(0.9, 0), config={"budget": {"avg_tokens": None}})
    own = {"config": {"budget": {"avg_tokens": 50}, "baseline": "fastv", "imports": ["mine"]}}
    make_run(tmp_path, "fastv", answers(0.5, 1), strategy="fastv", keep=0.5, **own)
    assert len(compare_methods(methods_in(tmp_path))[0]) == 1


def test_by_what_a_run_was_done_is_no_other_setting(tmp_path: Path) -> None:
    here = {"trainer": {"devices": 1, "strategy": "auto"}, "shard_timeout": 1800, "graphs": 0}
    there = {"trainer": {"devices": 8, "strategy": "ddp"}, "shard_timeout": 60, "graphs": 8}
    make_run(tmp_path, "none", answers(0.9, 0), config=here)
    make_run(tmp_path, "fastv", answers(0.5, 1), strategy="fastv", keep=0.5, config=there)
    assert len(compare_methods(methods_in(tmp_path))[0]) == 1
    there = {**there, "trainer": {"devices": 8, "precision": "bf16-mixed"}}
    make_run(tmp_path, "fastv", answers(0.5, 1), strategy="fastv", keep=0.5, config=there)
    assert compare_methods(methods_in(tmp_path))[0] == []


def test_runs_without_scores_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, "none", answers(0.9, 0))
    for number in range(8):
        make_run(tmp_path, f"s{number}", None, strategy=f"s{number}", keep=0.5)
    rows, missing = compare_methods(methods_in(tmp_path))
    assert rows == []
    (told,) = missing
    assert told.startswith("Compared with nothing, for a run of theirs has no scores")
    assert told.endswith("s0, s1, s2, s3, s4 and 3 more.")


def test_easy_and_hard_questions(sweep: Path) -> None:
    """Of 58 that the unpruned model gets right, a fifth of the pixels answers 30, half 50."""
    rows, missing = split_by_difficulty(methods_in(sweep))
    assert missing == []
    own = {(row["method"], row["keeps"] or row["image_scale"]): row for row in rows}
    assert len(own) == len(rows) == 8
    tenth, scores = own["fastv", "0.1"], np.array(answers(0.5, 11))
    assert (tenth["downsample_scale"], tenth["token_share"]) == (0.2, 0.1)
    assert (tenth["num_questions"], tenth["num_wrong"]) == (NUM, 2)
    assert (tenth["num_easy"], tenth["num_hard"]) == (30, 28)
    assert (tenth["easy"], tenth["hard"]) == (scores[:30].mean(), scores[30:58].mean())
    assert (tenth["hard_low"], tenth["hard_high"]) == wilson(float(scores[30:58].sum()), 28)
    assert own["fastv", "0.5"]["downsample_run"] == "small-0.5"
    both = np.array([answers(0.3, 22), answers(0.3, 23)]).mean(0)
    assert own["random", "0.1"]["hard"] == both[30:58].mean()
    small = own["downsample", "0.2"]
    assert (small["easy"], small["hard"]) == (1, 0)


def test_what_a_split_lacks_is_said(tmp_path: Path) -> None:
    make_run(tmp_path, "fastv", answers(0.5, 1), strategy="fastv", keep=0.5)
    make_run(tmp_path, "small", [1.0] * NUM, strategy="downsample", image_scale=0.5)
    rows, missing = split_by_difficulty(methods_in(tmp_path))
    assert rows == []
    assert missing == ["Not split by difficulty, for there is no unpruned run: fastv, downsample."]
    make_run(tmp_path, "none", [1.0] * NUM)
    rows, missing = split_by_difficulty(methods_in(tmp_path))
    assert [row["num_hard"] for row in rows] == [0, 0]
    assert "hard" not in rows[0]  # a share of none
    assert missing == [
        f"Split without {name}, which chooses nothing: keep 0.5 at 2."
        for name in ("pool", "random")
    ]


def test_the_end_of_a_sweep_writes_and_prints_them(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_sweep(sweep, ["none"], OmegaConf.create(["downsample"]))
    said = capsys.readouterr().out
    assert "question by question, after Holm's correction" in said
    # A line for each method with what was asked for, and one for all with `pool`.
    lines = [line.split() for line in said.splitlines() if "downsample" in line or "pool" in line]
    assert [line[:3] for line in lines if line[1:2] == ["pool"]] == [["all", "pool", "4"]]
    assert sorted(line[0] for line in lines if line[1:2] == ["downsample"]) == [
        *("fastv", "pool", "random"),
    ]
    with (sweep / "comparisons.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == comparisons.COLUMNS
    expected = compare_methods(methods_in(sweep), ["downsample"])[0]
    as_written = [{key: str(row[key]) for key in comparisons.COLUMNS} for row in expected]
    key = lambda row: (row["run"], row["against"])  # noqa: E731
    assert sorted(rows, key=key) == sorted(as_written, key=key)
    with (sweep / "difficulty.csv").open(newline="") as file:
        assert tuple(csv.DictReader(file).fieldnames or ()) == difficulty.COLUMNS

    # Again with another one, which costs no run; a name that is not there is told at the end.
    with pytest.raises(ValueError, match=r"baseline: expected .*, got 'nothing'\. Name one of"):
        finish_sweep(sweep, [], "nothing")
    with (sweep / "comparisons.csv").open(newline="") as file:
        against = {row["against"] for row in csv.DictReader(file)}
    assert against == {"unpruned", "random", "downsample", "pool"}


def test_nothing_to_compare_leaves_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "fastv", answers(0.5, 1), strategy="fastv", keep=0.5)
    finish_sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fastv", "results.csv"}
    assert "Holm" not in capsys.readouterr().out


def test_baselines_are_looked_at_before_anything_runs(tmp_path: Path) -> None:
    jobs = [["strategy=none"], ["strategy=fastv", "schedule.keep=0.5"], ["strategy.name=mine"]]
    for known in (None, "fastv", "mine", "fastv(queries=all)", "downsample", "fastv,keep=0.5"):
        check_baseline(known, jobs, tmp_path, "pyramiddrop")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "metrics.json").write_text("{}")
    check_baseline(["earlier", "fastv"], jobs, tmp_path, "pyramiddrop")
    with pytest.raises(ValueError, match=r"baseline: expected .*, got 'pool'\. Name one of"):
        check_baseline("pool", jobs, tmp_path, "pyramiddrop")
    with pytest.raises(ValueError, match=r"baseline: expected the name .*, got 3\. Write"):
        listed(3)
