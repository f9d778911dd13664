"""Files of a run and of a sweep.

A run is complete once `metrics.json` is there: its files take their places together, that one last.
`versions.json` says what the run was made from, so that a run of another model, other data or other
packages is not taken for it.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from tokenprune import __version__
from tokenprune.runs import files, tables
from tokenprune.runs.models import SHIPPED, load_config

if TYPE_CHECKING:
    from PIL import Image

CONFIG, METRICS, PREDICTIONS = "config.yaml", "metrics.json", "predictions.jsonl"
VERSIONS, KEPT, TABLE = "versions.json", "kept.json", "results.csv"
#: What the unpruned model is called when it is given smaller pictures (`data.image_scale`).
DOWNSAMPLE = "downsample"
#: First columns of results.csv. ci_low and ci_high are the ends of accuracy's 95 % interval; one
#: `accuracy_<kind>` per question kind follows them.
COLUMNS = (
    *("strategy", "schedule", "lam", "num_stages", "layers", "keeps", "image_scale"),
    *("positions", "seed"),
    *("num_samples", "num_images", "accuracy", "ci_low", "ci_high"),
    *("tflops", "tflops_ratio", "avg_tokens", "final_tokens", "prefill_ms", "kv_mb"),
    *("num_visual", "model", "data", "device", "run"),
)
#: Our own version, from the code that runs: an installed package of this name is somebody else's.
_OWN = {"tokenprune": __version__}
#: Other packages whose version decides what comes out.
_DECISIVE = ("torch", "transformers")
_PACKAGES = (*_DECISIVE, "pytorch-lightning", "hydra-core", "pillow")
_WHOLE = 2**26  # up to 64 MB a folder's files are read in full, beyond that their ends
_END = 2**20


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half-written.

    Raises:
        OSError: It cannot be written; names `path`.
    """
    with files.draft(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a text that is never seen half-written.

    Raises:
        OSError: It cannot be written; names `path`.
    """
    write_bytes(path, text.encode("utf-8"))


def write_image(path: Path, image: Image.Image, form: str = "PNG") -> None:
    """Writes a picture that is never seen half-written.

    Args:
        path: The file.
        image: The picture.
        form: As Pillow calls it.

    Raises:
        OSError: It cannot be written; names `path`.
    """
    content = io.BytesIO()
    image.save(content, form)
    write_bytes(path, content.getvalue())


def write_run(
    folder: Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    images: Mapping[str, Image.Image],
    versions: Mapping[str, str],
) -> None:
    """Writes everything that a run leaves, in the place of an earlier run, or nothing of it.

    Args:
        folder: The run's folder.
        config: Its resolved config.
        metrics: What was measured.
        predictions: One mapping per sample.
        kept: Kept tokens of the samples that are pictured.
        images: Pictures by their path within the folder.
        versions: What it was made from and on, see `fingerprint`.

    Raises:
        OSError: One of them cannot be written; names it.
    """
    with files.together(folder, METRICS) as stage:
        for name, image in images.items():
            write_image(stage / name, image)
        write_text(stage / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
        write_text(stage / PREDICTIONS, "".join(f"{line}\n" for line in lines))
        write_versions(stage, versions)
        write_text(stage / KEPT, json.dumps(kept, ensure_ascii=False))
        write_text(stage / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False))


def write_versions(folder: Path, versions: Mapping[str, str]) -> None:
    """Writes versions.json: Python, the machine, packages, and what is given."""
    machine = {"python": platform.python_version(), "platform": platform.platform()}
    packages = _OWN | {package: _version(package) for package in _PACKAGES}
    write_text(folder / VERSIONS, json.dumps(machine | packages | dict(versions), indent=2))


@lru_cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return "not installed"


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """What decides about a run besides its config: packages, contents of model and data, your code.

    Contents are those of local files and folders under keys that end in `path`, and the commit of a
    model on the Hub. Pictures beside a data file are not read. Of a strategy that is not ours it is
    the file that its class is in.

    Args:
        config: The resolved config.

    Raises:
        ValueError: If a model on the Hub cannot be found.
    """
    marks = _OWN | {package: _version(package) for package in _DECISIVE}
    for key, value in _paths(config.get("model"), "model"):
        if value in SHIPPED or Path(value).expanduser().exists():
            marks[key] = digest(SHIPPED.get(value) or Path(value).expanduser())
        elif (
            key == "model.path" and config["model"].get("_target_") == "tokenprune.runs.models.load"
        ):
            revision, trust = (config["model"].get(k) for k in ("revision", "trust_remote_code"))
            marks[key] = _commit(value, revision, bool(trust))
    for key, value in _paths(config.get("data"), "data"):
        if Path(value).expanduser().exists():
            marks[key] = digest(Path(value).expanduser())
    return marks | _code(config.get("strategy"))


@lru_cache  # a sweep asks the Hub once
def _commit(model: str, revision: str | None, trust_remote_code: bool) -> str:
    found = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    return str(getattr(found, "_commit_hash", None))


def commit_of(data: Any) -> dict[str, str]:
    """The commit on the Hub of a data set that was read, as another mark of a run.

    Only reading tells it, so that no run is another one by it: rows of two commits are told apart.
    """
    commit = getattr(data, "commit", None)
    return {} if commit is None else {"data.path": str(commit)}


def _code(strategy: Mapping[str, Any] | None) -> dict[str, str]:
    """The code of a user's strategy; ours has a version."""
    from tokenprune.runs import compose

    if strategy is None:
        return {}
    cls = type(compose.build_strategy(strategy))
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or cls.__module__.startswith("tokenprune."):
        return {}
    return {"strategy.code": digest(Path(file))}


def own_code(config: Mapping[str, Any]) -> dict[str, str]:
    """Contents of the user's modules and packages that make model and data, or are imported.

    Args:
        config: The resolved config.
    """
    names = {*(config.get("imports") or ()), *_targets([config.get("model"), config.get("data")])}
    tops = {name.partition(".")[0] for name in names} - {"tokenprune"}
    return {f"{top}.code": _digest_files(_stats(_sources(top))) for top in sorted(tops)}


def _sources(name: str) -> list[Path]:
    """The Python files of a module or a package, if it is no library's."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    libraries = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")]
    origin = Path((spec and spec.origin) or "")
    if not origin.is_file() or any(origin.is_relative_to(folder) for folder in libraries):
        return []
    folders = (spec and spec.submodule_search_locations) or []
    return [file for folder in folders for file in Path(folder).rglob("*.py")] or [origin]


def _targets(node: Any) -> Iterator[str]:
    """All that Hydra is told to make."""
    values = list(node.values()) if isinstance(node, Mapping) else node
    if isinstance(node, Mapping) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
    if isinstance(values, list):
        for value in values:
            yield from _targets(value)


def _paths(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Keys that end in `path`, with their values."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _paths(value, f"{name}.{key}")
    elif isinstance(node, str) and name.endswith("path"):
        yield name, node


def digest(path: Path) -> str:
    """Of names, sizes and contents; of large contents the first and last megabyte of each file."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return _digest_files(_stats(files))


def _stats(files: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each."""
    stats = [(str(file), file.stat()) for file in sorted(files)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=64)  # a sweep asks again before every run
def _digest_files(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    whole = sum(size for _, size, _ in files) <= _WHOLE
    for name, size, _ in files:
        digest.update(f"{Path(name).name}\0{size}\0".encode())
        with Path(name).open("rb") as file:
            digest.update(file.read(size if whole else _END))
            file.seek(0 if whole else max(0, size - _END))
            digest.update(b"" if whole else file.read())
    return digest.hexdigest()


#: What makes no other run, see `changes`.
ASIDE = {"logger", "imports", "baseline", "shard", "shard_timeout"}
#: Where a training goes on by itself: no other training. A checkpoint by its path makes one.
GOES_ON = (None, "last", "auto")
#: What of an evaluation's trainer can change its answers.
DECISIVE_TRAINER = ("precision", "limit_predict_batches")


def changes(
    folder: Path, config: Mapping[str, Any], marks: Mapping[str, str], last: str = METRICS
) -> list[str] | None:
    """What differs from the complete run in a folder; None where there is none.

    Args:
        folder: The run's folder.
        config: The resolved config; that a training goes on, what it logs to, which modules are
            imported, by what an evaluation is done and shared out, and what a sweep is compared
            with are no part of it.
        marks: Its `fingerprint`.
        last: What the run writes last: a file, or a folder as sharded checkpoints are.
    """
    files_there = all((folder / name).is_file() for name in (CONFIG, VERSIONS))
    if not files_there or not (folder / last).exists():
        return None
    versions = json.loads((folder / VERSIONS).read_text(encoding="utf-8"))
    differing = _differing(read_config(folder), config, last == METRICS)
    return differing + [key for key in marks if versions.get(key) != marks[key]]


def others(folder: Path, config: Mapping[str, Any], evaluates: bool) -> list[str]:
    """By what of its config the run in a folder, complete or begun, is another than this one.

    Args:
        folder: A run's folder; it may hold none.
        config: The resolved config.
        evaluates: Whether a trainer's processes are no part of it, see `changes`.
    """
    if not (folder / CONFIG).is_file():
        return []
    noted = read_config(folder)
    # A key that only this one has came with a later version.
    return [key for key in _differing(noted, config, evaluates) if key in noted]


def beside(folder: Path, config: Mapping[str, Any], evaluates: bool) -> Path:
    """Where a run goes whose folder holds another one; arguments as for `others`."""
    own = {key: _decisive(key, config[key], evaluates) for key in config.keys() - ASIDE}
    text = json.dumps(own, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return folder.with_name(f"{folder.name}-{digest}")


def _differing(old: Mapping[str, Any], config: Mapping[str, Any], evaluates: bool) -> list[str]:
    """In what two configs are no same run."""
    keys = sorted({*old, *config} - ASIDE)
    before, now = ({k: _decisive(k, c.get(k), evaluates) for k in keys} for c in (old, config))
    differing = [key for key in keys if before[key] != now[key]]
    if "positions" in differing and old.get("positions") == _published(config):
        differing.remove("positions")
    return differing


def _decisive(key: str, entry: Any, evaluates: bool) -> Any:
    """What of an entry of a config makes a run; earlier ones had whole pictures alone."""
    if key == "ckpt_path":
        return None if entry in GOES_ON else entry
    if key == "trainer" and evaluates and isinstance(entry, Mapping):
        return {name: entry.get(name) for name in DECISIVE_TRAINER}
    if isinstance(entry, Mapping) and entry.get("image_scale") == 1:
        return {name: value for name, value in entry.items() if name != "image_scale"}
    return entry


def _published(config: Mapping[str, Any]) -> str | None:
    """The policy that positions=auto stands for; None where another is asked for.

    A complete run that was asked for just that one shows that the model takes it.
    """
    from tokenprune.runs import compose

    if config.get("positions") != compose.AUTO:
        return None
    if config.get("strategy") is None:
        return "original"  # nothing is removed, so nothing moves
    return compose.published_positions(compose.build_strategy(config["strategy"]))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads what OmegaConf wrote, in a twentieth of its own reader's time: a row each, of many."""


# A date is a text there.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, like) for tag, like in own if not tag.endswith(":timestamp")]
    for first, own in _Loader.yaml_implicit_resolvers.items()
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config that a run has noted in its folder.

    Raises:
        ValueError: It is none.
    """
    path = folder / CONFIG
    try:
        noted = yaml.load(path.read_bytes(), _Loader)
    except yaml.YAMLError as error:
        noted = str(error).splitlines()[0]
    if not isinstance(noted, dict):
        raise ValueError(
            f"{CONFIG}: expected a run's config in {str(path)!r}, got {str(noted)[:80]!r}. Remove "
            "the folder, or choose another."
        )
    return {str(key): value for key, value in noted.items()}


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `metrics.json` of a complete run says."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    assert isinstance(metrics, dict)
    return metrics


def read_predictions(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `predictions.jsonl`.

    Raises:
        ValueError: A line is no JSON object.
    """
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path.name}: expected JSON in line {number} of {path}, got {error}. "
                    "Run that evaluation again."
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path.name}: expected JSON objects in {path}, got {type(record).__name__} in "
                    f"line {number}. Run that evaluation again."
                )
            yield record


def image_name(index: int, identifier: str) -> str:
    """Where the picture of a sample goes, whatever characters its id has."""
    digest = hashlib.blake2b(identifier.encode(errors="replace"), digest_size=4).hexdigest()
    return f"images/{index}-{digest}.png"


def row(metrics: Mapping[str, Any], run: str) -> dict[str, Any]:
    """A run as a row of results.csv."""
    values: dict[str, Any] = {key: metrics.get(key) for key in COLUMNS} | {"run": run}
    for end in ("low", "high"):  # no kind may look like an end of the interval
        values[f"ci_{end}"] = metrics.get(f"accuracy_{end}")
    for key in ("layers", "keeps"):
        if values[key] is not None:
            values[key] = " ".join(str(value) for value in values[key])
    return (
        values
        | {
            f"accuracy_{kind}": kind_metrics["accuracy"]
            for kind, kind_metrics in metrics.get("kinds", {}).items()
        }
        | {f"summary_{name}": value for name, value in metrics.get("metric_summary", {}).items()}
    )


def collect(folder: Path, runs: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of the complete runs in a folder.

    Args:
        folder: A sweep's folder.
        runs: Sub-folders in the order wanted; None for all there are, at any depth.
    """
    if runs is None:
        paths = sorted(path.parent for path in folder.rglob(f"*/{METRICS}"))
        runs = [str(path.relative_to(folder)) for path in paths]
    return [
        row(read_metrics(folder / run), run)
        for run in dict.fromkeys(runs)
        if (folder / run / METRICS).is_file()
    ]


def order(folder: Path) -> list[str]:
    """The runs that a folder's table has, in its order; none where there is no table to read."""
    try:
        with (folder / TABLE).open(encoding="utf-8", newline="") as file:
            return [entry["run"] for entry in csv.DictReader(file) if entry.get("run")]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes results.csv: a row per run; what a run does not have is empty."""
    kinds = sorted({key for row in rows for key in row} - set(COLUMNS))
    after = COLUMNS.index("ci_high") + 1
    write_rows(folder / TABLE, [*COLUMNS[:after], *kinds, *COLUMNS[after:]], rows)
    return folder / TABLE


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV file that is never seen half-written; what a row does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def settle(
    collects: Callable[[], list[dict[str, Any]]], writes: Callable[[list[dict[str, Any]]], object]
) -> list[dict[str, Any]]:
    """Writes a table of what is there until nothing has come since: the rows.

    Sweeps that share a folder each write its table. Whichever writes last has seen, after that, the
    runs of all, without a lock, which not every file system has.

    Args:
        collects: Gives the rows.
        writes: Writes them.
    """
    rows = collects()
    while rows:
        writes(rows)
        before, rows = rows, collects()
        if rows == before:
            break
    return rows


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints runs as a table for people."""
    names = ("model", "data", "image_scale", "seed")
    told = [name for name in names if len({entry.get(name) for entry in rows}) > 1]
    if len({entry.get("device") for entry in rows} - {None}) > 1:  # of earlier runs unknown
        told.append("device")
    heads = [
        [
            entry["strategy"],
            "" if entry["schedule"] is None else _schedule(entry),
            "" if entry["schedule"] is None else entry["positions"],
            *(str(entry.get(name)) for name in told),
        ]
        for entry in rows
    ]
    if len({*map(tuple, heads)}) < len(heads):  # what tells them apart is in their configs
        told.append("run")
        heads = [[*head, str(entry["run"])] for head, entry in zip(heads, rows, strict=True)]
    cells = [
        [
            *head,
            f"{100 * entry['accuracy']:.1f} %",
            _interval(entry),
            f"{entry['avg_tokens']:.1f}",
            f"{100 * entry['tflops_ratio']:.0f} %",
            "" if entry["prefill_ms"] is None else f"{entry['prefill_ms']:.1f} ms",
            "" if entry["kv_mb"] is None else f"{entry['kv_mb']:.2f} MB",
        ]
        for head, entry in zip(heads, rows, strict=True)
    ]
    texts = ("strategy", "schedule", "positions", *told)
    known = [entry for entry in rows if entry.get("num_images") is not None]
    by_image = any(entry["num_images"] < entry["num_samples"] for entry in known)
    interval = "95 % by image" if by_image else "95 %"
    tables.print_table(
        title, texts, ("accuracy", interval, "tokens", "FLOPs", "prefill", "KV cache"), cells
    )


def _interval(entry: Mapping[str, Any]) -> str:
    """Ends of accuracy's interval; nothing where it has none."""
    low, high = entry["ci_low"], entry["ci_high"]
    return "" if low is None or high is None else f"{100 * low:.1f}-{100 * high:.1f}"


def _schedule(entry: Mapping[str, Any]) -> str:
    """`pyramid λ=0.5, 4 stages`, or the cuts themselves."""
    if entry["lam"] is not None:
        return f"{entry['schedule']} λ={entry['lam']}, {entry['num_stages']} stages"
    cuts = zip(str(entry["layers"]).split(), str(entry["keeps"]).split(), strict=True)
    return ", ".join([entry["schedule"], *(f"{keep} at {layer}" for layer, keep in cuts)])
