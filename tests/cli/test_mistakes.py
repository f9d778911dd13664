"""Words for mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from commands import random_llava, refused

import tokenprune
from tokenprune.cli.jobs import quiet
from tokenprune.cli.mistakes import explain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evla"], "command: expected one of"),
        (["eval", "--foo"], "eval: unrecognized arguments: --foo"),
        (["bench", "prefil"], "'train'], got 'prefil'. Did you mean 'prefill'?"),
        (["eval", "foo"], "override: expected key=value, got 'foo'"),
        (["eval", "strategy=fastvv"], "got 'fastvv'. Did you mean 'fastv'?"),
        (["eval", "schedule=pyramidd"], "got 'pyramidd'. Did you mean 'pyramid'?"),
        (["eval", "model=tinny"], "got 'tinny'. Did you mean 'tiny'?"),
        (
            ["eval", "model=small"],
            "data.test.level: expected hard for model=small, got easy. Add da",
        ),
        (["eval", "data=scenes_hard"], "expected easy for model=tiny, got hard. Add data=scenes."),
        (["eval", "stratgy=fastv"], "got 'stratgy=fastv'. Did you mean 'strategy'?"),
        (["eval", "schedule.lamm=1"], "got 'schedule.lamm=1'. Did you mean 'schedule.lam'?"),
        (
            ["eval", "strategy=fastv", "schedule.lam=0.4"],
            "got 'schedule.lam=0.4'. Choices that have it: schedule=pyramid.",
        ),
        (["eval", "data.test.num_samples=forty"], "num_samples: expected an integer, got 'forty'"),
        (
            ["flops", "strategy=sparsevlm", "budget.avg_tokens=192"],
            "got schedule=sparsevlm, which names every cut itself. Choose schedule=pyramid, or",
        ),
        (["eval", "strategy.sauce=x"], "strategy.sauce: expected a key of the config"),
        (["eval", "hydra.run.dirr=x"], "hydra.run.dirr: expected a key of the config"),
        (["eval", "--cfg", "job", "model.pth=x"], "Did you mean 'model.path'?"),
        (["eval", "--cfg", "job", "-m"], "--cfg: expected a single run, got -m as well"),
        (["eval", "--resolve"], "--resolve: expected --cfg beside it"),
        (["eval", "strategy=fastv,random"], "expected one value, got 'fastv,random'. Add -m"),
        (["eval", "-m", "strategy=fastv,rondom"], "got 'rondom'. Did you mean 'random'?"),
        (["eval", "max_new_tokens=0"], "max_new_tokens: expected an integer >= 1, got 0"),
        (["eval", "num_pictures=-1"], "num_pictures: expected an integer >= 0, got -1"),
        (["eval", "seed=x"], "seed: expected an integer, got 'x'"),
        (["eval", "model=hub"], "model.path: expected a value, got none. Add model.path="),
        (["eval", "model=hub", "model.path=/no/where"], "model.path: expected a folder"),
        (["report", "/no/where"], "report: expected a folder with results, got /no/where"),
        (["report", "."], "report: expected results.csv or a run's metrics.json"),
        (["show", "no.png", "what?"], "show: expected a picture, got 'no.png'"),
        (["show", "https://x.org/a.png", "q"], "got the address 'https://x.org/a.png', and addr"),
        (["show", "a.png", "q", "hydra.run.dir=x"], "hydra.run.dir: expected settings that this c"),
        (["show"], "show: the following arguments are required"),
        (["verify", "strategy=none"], "strategy: expected one that prunes, got 'none'"),
        (
            ["train", "logits=ful"],
            "logits: expected one of ['all', 'supervised', 'full'], got",
        ),
        (
            ["bench", "logits=none"],
            "logits: expected one of ['all', 'supervised', 'full'], got",
        ),
        (["train", "strategy=fastvv"], "Did you mean 'fastv'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.share(6)
def test_mistakes_cost_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    if arguments[0] in ("show", "verify") or "seed" in "".join(arguments):
        arguments = arguments + random_llava(checkpoint) if len(arguments) > 1 else arguments
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "/bad.yaml, line 1: expected YAML, got: expected the node content, but found"),
        (b"name: fastv\n\tx: 1", "/bad.yaml, line 2: expected YAML, got: found character '\\t' t"),
        (b"name: fastv\nname: vtw", "/bad.yaml, line 2: expected YAML, got: found duplicate key"),
        (b"name: fastv\x01", "/bad.yaml, character 11: expected YAML, got: special characters are"),
        (
            b"# \nname: caf\xe9",
            "/bad.yaml, line 2: expected UTF-8 text, got the byte 0xe9. Save it",
        ),
        (b"- 1\n- 2", "/bad.yaml: expected keys with their values, got a list. Write"),
    ],
    ids=["open", "tab", "twice", "control", "latin-1", "list"],
)
@pytest.mark.parametrize("command", ["flops", "eval", "eval -m", "list"])
def test_a_broken_file_of_configs_is_named(
    command: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own" / "strategy").mkdir(parents=True)
    (tmp_path / "own" / "strategy" / "bad.yaml").write_bytes(content)
    given = [*command.split(), "--config-dir", str(tmp_path / "own")]
    if command != "list":
        assert message in refused([*given, "strategy=bad"], capsys)
    elif b"\xe9" in content:  # else it is listed, by its first comment
        assert message in refused(given, capsys)


def test_only_our_own_messages_are_told_in_a_line() -> None:
    def told(text: str, file: str | Path) -> str | None:
        raising = compile(f"raise ValueError({text!r})", str(file), "exec")
        with pytest.raises(ValueError, match=r".") as caught:
            exec(raising)
        return explain(caught.value)

    ours, message = Path(tokenprune.__file__).parent, "x: expected a, got b."
    assert told(message, ours / "data" / "sources.py") == message
    assert told(message, "/home/u/tokenprune/.venv/lib/torch/nn/functional.py") is None
    assert (
        told("not enough values to unpack (expected 1, got 0)", ours / "training" / "run.py")
        is None
    )


def test_warnings_of_ours_are_a_line() -> None:
    ours, theirs = (
        (UserWarning(text), UserWarning, "file.py", 3)
        for text in ("prune: expected one thing, got another.", "of somebody else")
    )
    with quiet():
        assert warnings.formatwarning(*ours) == f"tokenprune: {ours[0]}\n"
        assert warnings.formatwarning(*theirs).startswith("file.py:3: UserWarning: of somebody")
    assert warnings.formatwarning(*ours).startswith("file.py:3: UserWarning: prune: ")
