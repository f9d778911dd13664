"""The models of `lmms-eval --model tokenprune`: composed by overrides, as a command's config is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenprune.cli.checks import single_run
from tokenprune.evaluation.harness import ChatHarness, Harness
from tokenprune.evaluation.loading import load_model
from tokenprune.runs import results
from tokenprune.runs.compose import called, fit_pruning
from tokenprune.runs.devices import default_device


class _Composed(Harness):
    """A model with its strategy and schedule.

    Args:
        pretrained: Hub id or local folder; without one `overrides` choose the model.
        overrides: As on the command line of `tokenprune eval`, with `;` between them.
        config_dir: A folder with configs of yours.
        summary: A file for strategy, schedule, positions and costs, as JSON.
        batch_size: Questions that are answered at once.
        device: Where the model goes: a GPU, if there is one.
        max_batch_size: lmms-eval passes it; not used.

    Raises:
        ValueError: Something in the overrides cannot be honoured.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        overrides: str = "",
        config_dir: str | None = None,
        summary: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        model = [] if pretrained is None else ["model=hub", f"model.path={pretrained}"]
        given = [part.strip() for part in overrides.split(";") if part.strip()]
        config = single_run([*model, *given], config_dir)
        loaded = load_model(config)
        pruning = fit_pruning(config, loaded.model)
        scale = config.data.get("image_scale") or 1.0
        super().__init__(
            loaded, pruning, int(batch_size), device or default_device(), image_scale=scale
        )
        self._summary = summary

    def _tell_costs(self, *args: Any) -> dict[str, Any]:
        costs = super()._tell_costs(*args)
        if self._summary is not None and self.rank == 0 and costs:
            pruning = self.pruning
            stages = () if pruning is None else pruning.schedule.stages
            told = {
                "strategy": "none" if pruning is None else called(pruning.strategy),
                "layers": [stage.layer for stage in stages],
                "keeps": [stage.keep for stage in stages],
                "positions": "original" if pruning is None else pruning.positions,
            }
            results.write_text(Path(self._summary), json.dumps(told | costs, indent=2))
        return costs


class Simple(_Composed):
    """For tasks of the simple kind: `--force_simple`."""


class Chat(_Composed, ChatHarness):
    """For tasks of the chat kind."""
