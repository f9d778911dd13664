"""Benchmarks of lmms-eval on the shipped model: prompts, costs, and scores worked out by hand.

Runs where lmms-eval is installed: `make test-harness`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lmms_eval")

import datasets
import made_benchmarks as made
from lmms_eval import evaluator
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image
from processes import run
from tokenizers import AddedToken

import tokenprune as tp
from tokenprune.cli import main as cli
from tokenprune.cli.harness import Chat, Simple
from tokenprune.data.collate import ConversationCollator, PromptCollator
from tokenprune.data.scenes import SceneDataset
from tokenprune.evaluation import harness
from tokenprune.evaluation.loading import cached_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of lmms-eval and what it imports
LIST = ",".join(made.TASKS)
#: Cuts at two layers, and what comes of it on the shipped model's 144 tokens.
FASTV = ["strategy=fastv", "schedule.layer=2", "schedule.keep=0.25"]
FASTV_LENGTHS = [144, 144, *[36] * 6]


#: What lmms-eval knows of its tasks, by the folders that it has read: some thousand files.
_INDEX: dict[str, dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def _indexed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = TaskManager.initialize_tasks

    def remembered(self: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
        key = repr((include_path, include_defaults))
        if key not in _INDEX:
            _INDEX[key] = read(self, include_path, include_defaults)
        return dict(_INDEX[key])

    monkeypatch.setattr(TaskManager, "initialize_tasks", remembered)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made.write(tmp_path_factory.mktemp("data"))


@pytest.fixture
def prompts(files: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks find their data here, and hear the answers of their scripts; what they have asked.

    The model reads every prompt, and is pruned; only what it says is replaced.
    """
    script = {text: said for own in made.TASKS.values() for text, said in own.script.items()}
    seen: list[str] = []
    batch: list[Any] = []
    answer = harness.answer

    class Noting(PromptCollator):
        def __call__(self, samples: Any) -> Any:
            batch[:] = samples
            seen.extend(sample.turns[-1].question for sample in samples)
            return super().__call__(samples)

    def recite(loaded: Any, pruning: Any, inputs: Any, longest: int, **options: Any) -> Any:
        told = answer(loaded, pruning, inputs, 1, **options)
        texts = [script[sample.turns[-1].question] for sample in batch]
        return dataclasses.replace(told, texts=texts)

    monkeypatch.setattr(harness, "PromptCollator", Noting)
    monkeypatch.setattr(harness, "answer", recite)
    load = made.reader(files)
    monkeypatch.setattr(datasets, "load_dataset", load)
    from lmms_eval.tasks.gqa import utils

    monkeypatch.setattr(utils, "load_dataset", load)
    return seen


@pytest.fixture
def likely(prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The likeliest continuation of each question of a ranking task, whatever the model says."""
    script = {text: said for own in made.RANKED.values() for text, said in own.script.items()}
    batch: list[Any] = []

    class Noting(ConversationCollator):
        def __call__(self, samples: Any) -> Any:
            batch[:] = samples
            prompts.extend(sample.turns[-1].question for sample in samples)
            return super().__call__(samples)

    likelihoods = Simple._likelihoods

    def recite(self: Any, inputs: Any, whole: Any) -> Any:
        for sample, (_, _, *rest) in zip(batch, likelihoods(self, inputs, whole), strict=True):
            turn = sample.turns[-1]
            yield 0.5 if script[turn.question] == turn.answer else 1.5, False, *rest

    monkeypatch.setattr(harness, "ConversationCollator", Noting)
    monkeypatch.setattr(harness.Harness, "_likelihoods", recite)
    return script


def read(folder: str) -> Any:
    return json.loads(Path(folder, "metrics.json").read_text())


@pytest.mark.parametrize("own", [["strategy=none"], FASTV], ids=["unpruned", "fastv"])
def test_the_benchmarks_of_the_paper(own: list[str], prompts: list[str]) -> None:
    """Asked as written, judged by lmms-eval, each value as worked out by hand."""
    assert cli.main(["benchmark", "benchmark=paper", *own, "hydra.run.dir=run"]) == 0
    assert sorted(prompts) == sorted(text for own in made.TASKS.values() for text in own.script)
    metrics = read("run")
    report = json.loads(Path("run/harness/results.json").read_text())["results"]
    told = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert set(metrics["kinds"]) == set(made.TASKS)
    for name, task in made.TASKS.items():
        assert metrics["kinds"][name]["accuracy"] == pytest.approx(task.score), name
        for key, value in task.metrics.items():
            assert report[name][f"{key},none"] == pytest.approx(value), (name, key)
        if task.right is not None:
            assert sum(one["score"] for one in told if one["kind"] == name) == task.right, name
        averaged = name not in ("pope", "mme", "seedbench", "mmstar") and "mmbench" not in name
        assert (metrics["kinds"][name]["low"] is not None) is averaged, name
    mean = sum(task.score for task in made.TASKS.values()) / len(made.TASKS)
    assert metrics["accuracy"] == pytest.approx(mean)
    lengths = [144] * 8 if own == ["strategy=none"] else FASTV_LENGTHS
    # One question has three images.
    images = 1 + 2 / metrics["num_samples"]
    assert metrics["visual_tokens_per_layer"] == pytest.approx([n * images for n in lengths])


@pytest.mark.parametrize("own", [["strategy=none"], FASTV], ids=["unpruned", "fastv"])
def test_options_are_ranked_by_their_likelihood(
    own: list[str], prompts: list[str], likely: dict[str, str]
) -> None:
    """Through lmms-eval, which takes the option of the lowest loss; that is what was said."""
    task = made.RANKED["seedbench_ppl"]
    asked = ["benchmark", "tasks=[seedbench_ppl]", "form=simple", "num_pictures=0", *own]
    assert cli.main([*asked, "hydra.run.dir=run"]) == 0
    assert sorted(prompts) == sorted(4 * [*likely])
    metrics = read("run")
    assert metrics["accuracy"] == pytest.approx(task.score)
    assert metrics["num_samples"] == 4
    lines = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [(one["answer"], one["prediction"], one["score"]) for one in lines] == [
        *(("p", "p", 1.0), ("q", "s", 0.0), ("r", "r", 1.0), ("s", "q", 0.0))
    ]


def test_a_sweep_is_tabulated_reported_and_resumed(
    prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["benchmark", "-m", "tasks=[pope,ocrvqa]", "strategy=none,fastv"]
    sweep.append("hydra.sweep.dir=all")
    assert cli.main(sweep) == 0
    with Path("all/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["strategy"] for row in rows] == ["none", "fastv"]
    for row in rows:
        assert float(row["accuracy_pope"]) == pytest.approx(2 / 3)
        assert row["data"] == "pope,ocrvqa"
    assert float(rows[1]["tflops_ratio"]) < 0.7
    asked = len(prompts)
    assert cli.main(sweep) == 0
    assert capsys.readouterr().out.count("complete already") == 2
    assert len(prompts) == asked
    assert cli.main(["report", "all"]) == 0
    assert "pope" in Path("all/report.html").read_text()


def test_smaller_pictures_are_compared_task_by_task(prompts: list[str]) -> None:
    sweep = ["benchmark", "-m", "tasks=[pope,ocrvqa]", "strategy=none", "data.image_scale=1.0,0.1"]
    assert cli.main([*sweep, "hydra.sweep.dir=all", "num_pictures=0"]) == 0
    with Path("all/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["strategy"], row["image_scale"]) for row in rows] == [
        ("none", "1.0"),
        ("downsample", "0.1"),
    ]
    with Path("all/comparisons.csv").open(newline="") as file:
        compared = list(csv.DictReader(file))
    assert {(row["method"], row["against"], row["questions"]) for row in compared} == {
        ("downsample", "unpruned", "pope"),
        ("downsample", "unpruned", "ocrvqa"),
    }
    # What is said is the script's, so nothing differs but the pictures.
    assert {float(row["difference"]) for row in compared} == {0.0}


def test_the_plug_in_asks_about_smaller_pictures_when_told_so() -> None:
    model = Simple(overrides="strategy=none;data.image_scale=0.1", batch_size=1, device="cpu")
    whole = Simple(overrides="strategy=none", batch_size=1, device="cpu")
    asked = request("Which colour is K?", "red", lambda d: [d["image"]], 0, "own", "test")
    told = []
    for one in (model, whole):
        one.task_dict = {"own": {"test": [{"image": SceneDataset("test", 1)[0].image}]}}
        told.append(one.loglikelihood([asked])[0].text[0])
    assert (model.image_scale, whole.image_scale) == (0.1, 1.0)
    assert told[0] != told[1]
    assert model.records["own", 0]["num_visual"] == 144


def test_what_is_said_of_each_question(prompts: list[str]) -> None:
    assert cli.main(["benchmark", "tasks=[pope]", "num_pictures=2", "hydra.run.dir=run"]) == 0
    lines = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    right = {"yes": ("yes", "Yes", "no"), "no": ("yes", "no", "No.")}
    assert sorted((one["answer"], one["prediction"]) for one in lines) == sorted(
        (answer, said) for answer, several in right.items() for said in several
    )
    assert sum(one["score"] for one in lines) == 3
    assert len(list(Path("run/images").iterdir())) == 2
    assert {one["kind"] for one in lines} == {"pope"}
    marks = {one["picture"] for one in lines}
    assert None not in marks
    assert json.loads(Path("run/metrics.json").read_text())["num_images"] == len(marks)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["tasks=[popo]"], "tasks: expected tasks of lmms-eval, got 'popo'"),
        (["tasks=[]"], "tasks: expected names of lmms-eval's tasks"),
        (["tasks=[pope]", "form=both"], "form: expected one of ['chat', 'simple']"),
        (["tasks=[pope]", "limit=0"], "limit: expected an integer >= 1"),
        (
            ["tasks=[vqav2_test]"],
            "'vqav2_test', which writes them to a file for others to judge. Near",
        ),
        (["tasks=[docvqa]"], "got 'docvqa_test', which writes them to a file"),
        (["tasks=[pope,mme]", "limit=3"], "limit: expected an even number for 'mme'"),
        (["tasks=[pope]", "include_path=nowhere"], "include_path: expected a folder of tasks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_cost_one_line(
    own: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["benchmark", *own, "hydra.run.dir=run"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


PERCENT_TASK = """
task: percent
dataset_path: parquet
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function asking.picture
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 1, do_sample: false, modality: sound}
process_results: !function asking.judge
metric_list: [{metric: points, aggregation: mean, higher_is_better: true}]
"""


def test_what_was_asked_is_kept_though_no_metric_is_a_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_task(tmp_path, PERCENT_TASK, num=2)
    asked = ["benchmark", "tasks=[percent]", "include_path=tasks", "hydra.run.dir=run"]
    assert cli.main([*asked, "num_pictures=0"]) == 2
    out, error = capsys.readouterr()
    assert "percent: points is no share of the best" in out
    assert out.count("percent: options of the task that are not used: modality") == 1
    assert "tasks: expected at least one whose metric is a share of the best, got none" in error
    report = json.loads(Path("run/harness/results.json").read_text())
    assert report["results"]["percent"]["points,none"] == 37.5
    assert not Path("run/metrics.json").exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the model is asked, in their order."""
    seen: list[str] = []
    call = PromptCollator.__call__

    def noting(self: Any, samples: Any) -> Any:
        seen.extend(sample.turns[-1].question for sample in samples)
        return call(self, samples)

    monkeypatch.setattr(PromptCollator, "__call__", noting)
    return seen


@pytest.mark.parametrize("form", ["chat", "simple"])
def test_answers_outlive_a_task_that_fails_to_judge_them(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    own_task(tmp_path, PERCENT_TASK, num=5)
    asking = tmp_path / "tasks/asking.py"
    judge = asking.read_text().replace("37.5", "0.5")
    command = ["benchmark", "tasks=[percent]", "include_path=tasks", f"form={form}"]
    command += ["strategy=fastv", "schedule.layer=2", "schedule.keep=0.25", "num_pictures=2"]
    asking.write_text(judge.replace("return {", "return 1 / 0, {"))
    assert cli.main([*command, "batch_size=2", "hydra.run.dir=run"]) != 0
    told = capsys.readouterr().err
    assert "what is done is kept. To go on: the same command with hydra.run.dir=" in told
    assert len(asked) == 5
    (notes,) = Path("run/parts").iterdir()
    assert cli.main([*command, "tasks=[percant]", "hydra.run.dir=run"]) == 2
    assert "kept" not in capsys.readouterr().err  # it would only fail once more
    # A process that is killed while it writes leaves half a line, here the third.
    notes.write_bytes(notes.read_bytes()[:-9])
    asking.write_text(judge)
    assert cli.main([*command, "batch_size=3", "hydra.run.dir=run"]) == 0
    assert "4 of 5 answers are there already" in capsys.readouterr().out
    assert len(asked) == 6
    assert not Path("run/parts").exists()
    assert cli.main([*command, "batch_size=3", "hydra.run.dir=whole"]) == 0
    assert len(asked) == 11
    for name in ("predictions.jsonl", "kept.json"):
        assert Path("run", name).read_text() == Path("whole", name).read_text()
    own, whole = read("run"), read("whole")
    assert own.pop("prefill_ms") > 0
    assert whole.pop("prefill_ms") > 0
    assert own == whole
    assert len(list(Path("run/images").iterdir())) == 2


MESSAGES = """
def talk(row):
    parts = [{"type": "image", "url": picture(row)[0]}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": parts}]
"""


def test_what_is_asked_otherwise_is_asked_again(tmp_path: Path, asked: list[str]) -> None:
    """In the chat form lmms-eval itself tells of a prompt nothing that changes with it."""
    own_task(tmp_path, PERCENT_TASK + "doc_to_messages: !function asking.talk\n", num=3)
    asking = tmp_path / "tasks/asking.py"
    whole = asking.read_text().replace("37.5", "0.5") + MESSAGES
    fails = whole.replace("return {", "return 1 / 0, {")
    command = ["benchmark", "tasks=[percent]", "include_path=tasks", "hydra.run.dir=run"]
    other = 'row["question"] + (" now" if row["question"] == FIRST else "")'
    asking.write_text(fails)
    assert cli.main(command) != 0
    assert len(asked) == 3
    first = asked[0]
    for text, new in (
        (fails.replace('row["question"]}]', f"{other}}}]").replace("FIRST", repr(first)), 1),
        (fails.replace("convert(", "rotate(180).convert("), 3),
        (whole, 0),
    ):
        before = len(asked)
        asking.write_text(text)
        assert (cli.main(command) == 0) == (text == whole)
        assert len(asked) - before == new


# ---------------------------------------------------------------------------------------- plug-in


def test_lmms_eval_finds_the_plug_in() -> None:
    assert get_model("tokenprune") is Chat
    assert get_model("tokenprune", force_simple=True) is Simple


@pytest.mark.parametrize("form", [Chat, Simple])
def test_lmms_eval_asks_the_plug_in(form: Any, prompts: list[str], tmp_path: Path) -> None:
    own = "overrides=strategy=fastv;schedule.layer=2;schedule.keep=0.25,summary=costs.json"
    model = form.create_from_arg_string(own, {"batch_size": 4, "device": "cpu"})
    report = evaluator.simple_evaluate(model, tasks=["pope"], bootstrap_iters=0)
    assert report["results"]["pope"]["pope_f1_score,none"] == pytest.approx(2 / 3)
    costs = json.loads(Path("costs.json").read_text())
    assert costs["visual_tokens_per_layer"] == FASTV_LENGTHS
    assert (costs["strategy"], costs["layers"], costs["keeps"]) == ("fastv", [2], [0.25])
    assert report["throughput"]["avg_avg_tokens"] == sum(FASTV_LENGTHS) / 8


OWN_TASK = """
task: scenes
dataset_path: parquet
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function asking.picture
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ASKING = """
def picture(row):
    return [row["image"].convert("RGB")]

def judge(row, results):
    return {"points": 37.5}
"""


def own_task(folder: Path, task: str, num: int) -> None:
    """A task of one's own in `tasks`, about scenes that are written to a folder."""
    scenes = [SceneDataset("test", num)[number] for number in range(num)]
    rows = [
        {"image": s.image, "question": s.turns[0].question, "answer": s.turns[0].answer}
        for s in scenes
    ]
    data = folder / "scenes.parquet"
    datasets.Dataset.from_list(rows).to_parquet(data)
    Path("tasks").mkdir()
    Path("tasks/asking.py").write_text(ASKING)
    Path("tasks/own.yaml").write_text(task.replace("DATA", str(data)))


def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Seven questions by two processes, one of which has to be given one of them twice."""
    own_task(tmp_path, OWN_TASK, num=7)
    found = []
    for processes in (1, 2):
        own = f"overrides=strategy=fastv;schedule.keep=0.1,summary=costs{processes}.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(processes)]
        asked = ["-m", "lmms_eval", "--model", "tokenprune", "--model_args", own]
        asked += ["--include_path", "tasks", "--tasks", "scenes", "--batch_size", "2"]
        asked += ["--output_path", f"out{processes}", "--log_samples"]
        run([*launch, *asked], env=os.environ | {"ACCELERATE_USE_CPU": "true"})
        (report,) = Path(f"out{processes}").rglob("*_results.json")
        (samples,) = Path(f"out{processes}").rglob("*_samples_scenes.jsonl")
        told = [json.loads(line) for line in samples.read_text().splitlines()]
        answers = {one["doc_id"]: one["filtered_resps"] for one in told}
        assert len(told) == len(answers) == 7
        found.append((json.loads(report.read_text())["results"]["scenes"], answers))
        costs = json.loads(Path(f"costs{processes}.json").read_text())
        assert costs["num_requests"] == 7
        assert costs["visual_tokens_per_layer"] == [144, 144, *[14] * 6]
    assert found[0] == found[1]


def test_nobody_waits_for_a_process_whose_answers_are_cached(tmp_path: Path) -> None:
    """With lmms-eval's own cache a process may have nothing to ask, while the other has."""
    own_task(tmp_path, OWN_TASK, num=7)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "lmms_eval", "--model", "tokenprune", "--model_args"]
    command += ["overrides=strategy=fastv;schedule.keep=0.1,summary=costs.json"]
    command += ["--include_path", "tasks", "--tasks", "scenes", "--output_path", "out"]
    command += ["--use_cache", str(tmp_path / "cache"), "--limit"]
    for limit, num_asked in (("4", 4), ("5", 1)):  # of the second run one question is new
        run([*command, limit], env=os.environ | {"ACCELERATE_USE_CPU": "true"})
        assert json.loads(Path("costs.json").read_text())["num_requests"] == num_asked


def test_a_run_in_which_nothing_is_pruned_fails(prompts: list[str]) -> None:
    """Of 144 tokens, .9999 are 144, rounded."""
    own = "overrides=strategy=fastv;schedule.keep=0.9999;schedule.rounding=nearest"
    model = Chat.create_from_arg_string(own, {"batch_size": 4, "device": "cpu"})
    with pytest.raises(ValueError, match="expected image tokens to be pruned, got all of them"):
        evaluator.simple_evaluate(model, tasks=["pope"], bootstrap_iters=0)


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_what_ends_a_continuation_does_not_count() -> None:
    """An end of turn that is special, but none of the named special tokens, as Gemma's is."""
    model = Simple(overrides="strategy=fastv", batch_size=2, device="cpu")
    processor, net = model.loaded.processor, model.loaded.model
    template = processor.chat_template
    processor.tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    net.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {% for c in m.content %}"
        "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} "
        "ASSISTANT:{% else %} {{ m.content[0].text }}<end_of_turn>{% endif %}{% endfor %}"
    )
    seen: list[Any] = []
    forward = net.forward
    net.forward = lambda *own, **named: seen.append(named["labels"]) or forward(*own, **named)
    model.task_dict = {"own": {"test": [{"image": made.picture(0)}]}}
    try:
        found = model.loglikelihood(
            [
                request("Which?", text, lambda d: [d["image"]], 0, "own", "test")
                for text in (" red", "<end_of_turn>", "")
            ]
        )
    finally:
        del net.forward
        processor.chat_template = template
        cached_model.cache_clear()
    counted = [
        processor.tokenizer.decode(row[row != -100]).strip() for batch in seen for row in batch
    ]
    assert sorted(counted) == ["<end_of_turn>", "<end_of_turn> <end_of_turn>", "red"]
    assert all(math.isfinite(one.text[0]) for one in found)


def test_lmms_eval_is_told_how_long_answers_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that a batch's answer moves by three seconds, and its first token by one."""
    told: list[dict[str, Any]] = []
    clock = [0.0]

    def note(seconds: float, num_tokens: int, speed: float, additional_metrics: Any) -> None:
        own = {"seconds": seconds, "tokens": num_tokens, "speed": speed}
        told.append(own | {key: additional_metrics[key] for key in ("num_requests", "prefill_ms")})

    def slowly(*own: Any, **options: Any) -> Any:
        clock[0] += 3
        found = answer(*own, **options)
        texts = ["red blue"] * len(found.texts)
        return dataclasses.replace(found, seconds=1.0, texts=texts)

    answer = harness.answer
    monkeypatch.setattr(harness, "answer", slowly)
    monkeypatch.setattr(harness, "now", lambda device: clock[0])
    monkeypatch.setattr(harness, "log_metrics", note)
    model = Simple(overrides="strategy=none", batch_size=2, device="cpu")
    model.task_dict = {"own": {"test": [{"image": made.picture(n)} for n in range(5)]}}
    asked = [
        request("Which?", {"max_new_tokens": 1}, lambda d: [d["image"]], n, "own", "test")
        for n in range(5)
    ]
    num = len(model.loaded.processor.tokenizer("red blue", add_special_tokens=False)["input_ids"])
    model.generate_until(asked)
    model.generate_until(asked[:2])
    assert told == [  # batches of 2, 2 and 1: half a second a question, half, and one
        {"seconds": 9, "tokens": 5 * num, "speed": 5 * num / 9, "num_requests": 5}
        | {"prefill_ms": 500},
        {"seconds": 3, "tokens": 2 * num, "speed": 2 * num / 3, "num_requests": 2}
        | {"prefill_ms": 500},
    ]


def test_a_question_about_no_image_is_answered_beside_others() -> None:
    model = Simple(overrides="strategy=fastv", batch_size=2, device="cpu")
    model.task_dict = {"own": {"test": [{"image": made.picture(0)}, {"image": None}]}}

    def visual(document: Any) -> Any:
        return document["image"] and [document["image"]]

    given = {"max_new_tokens": 1}
    asked = [request("Which?", given, visual, n, "own", "test") for n in range(2)]
    assert len(model.generate_until(asked)) == 2
    assert [model.records["own", n]["given"] for n in range(2)] == [144, 0]


class Drawn:
    """Documents whose images are drawn when they are asked for; how many of these are alive."""

    def __init__(self) -> None:
        self.drawn: list[weakref.ref[Any]] = []
        self.most = 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = made.picture(number)
        self.drawn.append(weakref.ref(image))
        self.most = max(self.most, sum(own() is not None for own in self.drawn))
        return {"image": image}


@pytest.mark.parametrize("likelihoods", [False, True])
def test_images_are_read_as_their_batches_come(likelihoods: bool) -> None:
    model = Simple(overrides="strategy=none", batch_size=2, device="cpu")
    documents = Drawn()
    model.task_dict = {"own": {"test": documents}}
    second = " red" if likelihoods else {"max_new_tokens": 1}
    asked = [
        request("Which colour?", second, lambda d: [d["image"]], number, "own", "test")
        for number in range(24)
    ]
    found = (model.loglikelihood if likelihoods else model.generate_until)(asked)
    assert len(found) == 24
    assert documents.most <= 3 * 2  # a batch of two, and the one before


def test_the_largest_images_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By what the files say of them: a document is read once, and one of each task once more."""
    sizes = [40, 80, 20, 60]
    rows = [{"images": [Image.new("RGB", (size, 10))], "question": "q?"} for size in sizes]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "own.parquet")
    documents = datasets.load_dataset("parquet", data_files=str(tmp_path / "own.parquet"))["train"]
    model = Simple(overrides="strategy=none", batch_size=2, device="cpu")
    model.task_dict = {"own": {"test": documents}}
    seen: list[int] = []

    def visual(document: Any) -> Any:
        seen.append(document["images"][0].width)
        return document["images"]

    given = {"max_new_tokens": 1}
    model.generate_until([request("q?", given, visual, n, "own", "test") for n in range(4)])
    assert seen == [40, 80, 60, 40, 20]


@pytest.mark.parametrize("strategy", ["none", "fastv"])
def test_a_likelihood_is_that_of_the_model(strategy: str) -> None:
    """Against the logits of one row alone, token by token."""
    model = Simple(overrides=f"strategy={strategy}", batch_size=3, device="cpu")
    documents = [{"image": made.picture(n)} for n in range(3)]
    model.task_dict = {"own": {"test": documents}}
    says = ["red", "K 7", "yes"]
    found = model.loglikelihood(
        [
            request("Which colour is K?", f" {text}", lambda d: [d["image"]], n, "own", "test")
            for n, text in enumerate(says)
        ]
    )
    processor, net = model.loaded.processor, model.loaded.model
    for number, text in enumerate(says):
        prompt = model._prompts(
            [
                model._continued(
                    request(
                        "Which colour is K?", text, lambda d: [d["image"]], number, "own", "test"
                    )
                ).read()
            ]
        )["inputs"]
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        loss, greedy = 0.0, True
        grown = dict(prompt)
        for token in ids[0]:
            with torch.no_grad():
                if model.pruning is None:
                    logits = net(**grown).logits[0, -1]
                else:  # chosen by the prompt's last token, whatever has been said since
                    labels = torch.full_like(grown["input_ids"], -100)
                    labels[:, prompt["input_ids"].shape[1] :] = 1
                    own = model.pruning
                    if grown["input_ids"].shape == prompt["input_ids"].shape:
                        labels = None
                    with tp.prune(net, own.strategy, own.schedule, own.positions):
                        logits = net(
                            **grown, **({} if labels is None else {"labels": labels})
                        ).logits[0, -1]
            told = logits.float().log_softmax(-1)
            loss -= told[token].item() / ids.shape[1]
            greedy &= bool(told.argmax() == token)
            grown["input_ids"] = torch.cat([grown["input_ids"], token.view(1, 1)], 1)
            mask = grown["attention_mask"]
            grown["attention_mask"] = torch.cat([mask, mask.new_ones(1, 1)], 1)
        assert math.isclose(found[number].text[0], loss, abs_tol=1e-4)
        assert found[number].text[1] == greedy
