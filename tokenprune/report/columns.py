"""The columns of results.csv: what each is called, how it is shown, what it means."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """A column in the page.

    Attributes:
        heading: What stands above it.
        style: How its values are shown: `text`, `number`, `percent` or `flops`.
        meaning: What it is, in a sentence.
    """

    heading: str
    style: str
    meaning: str


#: By their names in results.csv.
COLUMNS: dict[str, Column] = {
    "strategy": Column(
        "strategy",
        "text",
        "The rule that decides which visual tokens survive a cut. none: the unpruned model.",
    ),
    "schedule": Column(
        "schedule",
        "text",
        "How many survive at which layer. pyramid: the fraction λ^s after cut s; one_shot: one "
        "cut; explicit: a list of cuts.",
    ),
    "lam": Column(
        "λ", "number", "The fraction of the visual tokens that each cut of a pyramid keeps."
    ),
    "num_stages": Column(
        "stages",
        "number",
        "The number of parts into which the cuts divide the decoder, one more than there are cuts.",
    ),
    "layers": Column(
        "layers", "text", "The decoder layers before which tokens are dropped, from 0."
    ),
    "keeps": Column(
        "keep",
        "text",
        "The fraction of the sample's original visual tokens alive after each of these cuts.",
    ),
    "image_scale": Column(
        "picture",
        "number",
        "Share of the pictures' pixels that the model was given (data.image_scale). downsample: "
        "the unpruned model on smaller pictures.",
    ),
    "positions": Column(
        "positions",
        "text",
        "original: survivors keep their position indices; renumbered: they close ranks.",
    ),
    "seed": Column("seed", "number", "The seed of the run."),
    "num_samples": Column("questions", "number", "The number of questions asked."),
    "num_images": Column(
        "images", "number", "The number of images that they are about, where that is known."
    ),
    "accuracy": Column("right (%)", "percent", "The share of the questions answered right."),
    "ci_low": Column(
        "from (%)",
        "percent",
        "Lower end of the 95 % interval of accuracy (Wilson; by image where one has several "
        "questions).",
    ),
    "ci_high": Column("to (%)", "percent", "Upper end of that interval."),
    "tflops": Column(
        "FLOPs",
        "flops",
        "Floating-point operations on visual tokens in all decoder layers, mean per question, by "
        "PyramidDrop's formula: 4nd² + 2n²d + 3ndm per layer with n visual tokens, width d and "
        "feed-forward width m. In results.csv in units of 10¹².",
    ),
    "tflops_ratio": Column("of unpruned (%)", "percent", "tflops relative to the unpruned model."),
    "avg_tokens": Column(
        "mean tokens",
        "number",
        "Visual tokens that a decoder layer processes, mean over layers and questions.",
    ),
    "final_tokens": Column(
        "final tokens", "number", "Visual tokens in the last decoder layer, mean."
    ),
    "prefill_ms": Column(
        "prefill (ms)",
        "number",
        "Wall time from the prompt to the first token, per question of a batch, in milliseconds; "
        "the median over batches, on the machine of the run.",
    ),
    "kv_mb": Column(
        "KV cache (MB)",
        "number",
        "Key-value cache of the whole prompt, mean, in 10⁶ bytes.",
    ),
    "num_visual": Column("visual tokens", "number", "Visual tokens before any cut, mean."),
    "model": Column("model", "text", "The checkpoint that was evaluated."),
    "data": Column("data", "text", "The data that was asked about."),
    "device": Column("device", "text", "What the model ran on: its times are of that."),
    "run": Column("run", "text", "The folder of the run, relative to this page."),
}


#: Columns of which a reader of many runs wants some values only.
FILTERS = (
    *("strategy", "schedule", "lam", "num_stages", "layers", "keeps", "image_scale"),
    *("positions", "seed", "model", "data", "device"),
)


def column(name: str) -> Column:
    """How a column of results.csv is shown, one that is not known included."""
    if name in COLUMNS:
        return COLUMNS[name]
    if name.startswith("accuracy_"):
        kind = name.removeprefix("accuracy_")
        return Column(f"{kind} (%)", "percent", f"accuracy over the questions of kind {kind}.")
    return Column(name, "number", "Written by the run; not described here.")
