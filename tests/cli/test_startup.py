"""What each command loads: a text, a choice or a mistake must not cost the seconds of torch.

docs/performance.md has the times.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import pytest
from processes import run

import tokenprune as tp
from tokenprune.strategy import strategy_class

HEAVY = (
    *("torch", "transformers", "pytorch_lightning", "lightning_fabric", "tokenizers", "numpy"),
    *("hydra", "omegaconf", "pandas", "matplotlib", "PIL", "datasets", "peft", "jinja2", "rich"),
    *("tensorboard", "huggingface_hub"),
)
#: Commands one after another in one process: each one's exit code, and what is loaded by then.
CODE = """
import contextlib, io, json, sys
sys.argv = ["tokenprune"]
import tokenprune.cli.__main__
from tokenprune.cli.main import main
commands, heavy = json.loads(sys.stdin.read())
found = []
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(command.split())
    found.append([command, code, sorted(set(heavy) & set(sys.modules))])
print(json.dumps(found))
"""


def loaded(commands: Sequence[str]) -> list[list[object]]:
    """Runs commands in a new process: each, its exit code, and what of the heavy is loaded then."""
    done = run([sys.executable, "-c", CODE], text=json.dumps([commands, HEAVY]))
    found: list[list[object]] = json.loads(done.stdout)
    return found


WORDS = [
    ("", 2),
    ("--help", 0),
    ("--version", 0),
    ("evla", 2),
    *((f"{name} --help", 0) for name in ("collect", "report", "list", "show", "verify", "flops")),
    ("show", 2),
]
LISTS = [("list", 0)]
COLLECTIONS = [("collect .", 2), ("collect nowhere", 2)]
REPORTS = [("report .", 2), ("report nowhere", 2)]
COMPOSED = [
    ("eval --cfg job", 0),
    *((f"{name} --help", 0) for name in ("eval", "train", "bench")),
    *((f"flops --csv model={name}", 0) for name in ("tiny", "llava_1_5_7b", "llava_next_7b")),
    ("flops --csv shape=hidden_1024", 0),
]
MISTAKES = [
    *(f"{name} strategy=fastvv" for name in ("eval", "train", "bench", "verify", "flops")),
    *(f"{name} strategy.name=fastvv" for name in ("eval", "train", "bench", "flops")),
    *(f"{name} schedule.lamm=0.5" for name in ("eval", "train", "bench")),
    *(f"{name} schedule.lam=2" for name in ("eval", "train", "bench", "verify", "flops")),
    *(f"{name} positions=moved" for name in ("eval", "train", "bench")),
    *(f"{name} schedule.layers=[9] schedule.num_stages=2" for name in ("eval", "train")),
    "eval -m strategy=fastv,random schedule.lam=0.5,2",
    "eval metric=exct",
    "eval max_new_tokens=0",
    "eval model.dtype=float8",
    "eval budget.avg_tokens=9999",
    "eval model=hub model.path=/no/where schedule.lam=2",
    "eval model=hub model.path=/no/where strategy.queries=some",
    "eval model=hub model.path=/no/where schedule=one_shot schedule.keep=2",
    "train monitor=loss",
    "train keep=all",
    "train parts=[head]",
    "train model.tuning=half",
    "train learning_rate=0",
    "train trainer.precision=8",
    "train trainer.max_steps=-1",
    "bench measure=speed",
    "benchmark tasks=[]",
    "benchmark form=both",
    "benchmark limit=0",
    "benchmark include_path=/no/where",
    "benchmark strategy=fastvv",
    "bench shape=tinyy",
    "bench resolution=336",
    "bench shape.num_heads=7",
]
COSTS = [
    *(f"flops model=llava_1_5_7b strategy={name}" for name in (*tp.available(), "none")),
    *(
        f"flops model=tiny strategy={name} budget.avg_tokens=90"
        for name in tp.available()
        if strategy_class(name).published(8).schedule != "explicit"  # which leaves nothing open
    ),
    "flops model=llava_next_7b",
    "flops model=llava_next_7b strategy=fastv budget.tflops=9.5 budget.convention=exact",
    "flops shape=hidden_1024",
    "flops shape=tiny budget.kv_mb=1",
]


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (WORDS, []),
        (LISTS, ["omegaconf"]),
        (COLLECTIONS, ["omegaconf"]),
        (REPORTS, ["jinja2", "omegaconf"]),
        (COMPOSED, ["hydra", "omegaconf"]),
        ([(command, 2) for command in MISTAKES[::5]], ["hydra", "omegaconf"]),
        pytest.param(
            [(command, 2) for command in MISTAKES], ["hydra", "omegaconf"], marks=pytest.mark.matrix
        ),
        ([(command, 0) for command in COSTS[::5]], ["hydra", "omegaconf", "rich"]),
        pytest.param(
            [(command, 0) for command in COSTS],
            ["hydra", "omegaconf", "rich"],
            marks=pytest.mark.matrix,
        ),
    ],
    ids=[
        *("words", "lists", "collections", "reports", "composed"),
        *("mistakes", "all", "costs", "every"),
    ],
)
@pytest.mark.share(4)
def test_a_command_loads_what_it_needs(
    commands: Sequence[tuple[str, int]], expected: list[str]
) -> None:
    found = loaded([command for command, _ in commands])
    assert found == [[command, code, expected] for command, code in commands]
