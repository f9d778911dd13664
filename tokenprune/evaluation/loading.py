"""Model and data of a run, kept in memory for the next one of a sweep, one of each a process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tokenprune.runs import targets
from tokenprune.runs.compose import plain
from tokenprune.runs.models import LoadedModel


class RememberedBatches:
    """A loader whose batches stay in memory if they are small: a sweep prepares them once.

    Args:
        loader: Gives batches with tensors under `inputs`.
        limit: Bytes of tensors and pictures that may stay.
    """

    def __init__(self, loader: Any, limit: int = 2**29) -> None:
        self.loader, self.limit = loader, limit
        try:
            self._most = len(loader)
        except TypeError:  # a stream
            self._most = -1
        self.batches: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.batches is not None:
            yield from self.batches
            return
        seen: list[dict[str, Any]] = []
        size = 0
        for batch in self.loader:
            batch = _unshared(batch | {"inputs": _unshared(batch["inputs"])})
            size += sum(v.nbytes for v in batch["inputs"].values() if isinstance(v, Tensor))
            images = [image for sample in batch["samples"] for image in sample.images]
            size += sum(image.width * image.height * len(image.getbands()) for image in images)
            if size <= self.limit:
                seen.append(batch)
            else:
                seen.clear()
            if len(seen) == self._most:  # who knows that asks for no more
                self.batches = seen
            yield batch
        if size <= self.limit:
            self.batches = seen


def _unshared(values: Any) -> Any:
    """A mapping without what a worker shares, of which a process can hold only so much."""
    own = {key: value.clone() for key, value in values.items() if _is_shared(value)}
    return type(values)({**values, **own})


def _is_shared(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.is_shared())  # type: ignore[no-untyped-call]


def load_model(config: DictConfig, marks: Mapping[str, str] | None = None) -> LoadedModel:
    """The model of a run, from memory if the run before had the same.

    Args:
        config: As `configs/eval.yaml` composes it.
        marks: What its files are, see `results.fingerprint`: those that changed are read again.
    """
    return cached_model(key_of(config.model, marks))


def device_of(model: Any) -> str:
    """What a model is on: a GPU by its name, else the device's kind."""
    device = model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def key_of(config: DictConfig, marks: Mapping[str, str] | None) -> str:
    """Names what is in memory, in a text that another process can load it by."""
    return json.dumps([plain(config), marks])


@lru_cache(maxsize=1)
def cached_model(key: str) -> LoadedModel:
    """The model of a key."""
    loaded = targets.build(_config(key), "model", LoadedModel)
    assert isinstance(loaded, LoadedModel)
    return loaded


@lru_cache(maxsize=1)
def cached_data(key: str, model: str) -> pl.LightningDataModule:
    """The data of a key, for the model of another."""
    processor = cached_model(model).processor
    data = targets.build(_config(key), "data", pl.LightningDataModule, processor=processor)
    assert isinstance(data, pl.LightningDataModule)
    if type(data).predict_dataloader is pl.LightningDataModule.predict_dataloader:
        raise ValueError(
            f"data: expected a data module with predict_dataloader, got a {type(data).__name__} "
            "without. Give it one, as docs/data.md shows."
        )
    return data


@lru_cache(maxsize=1)
def cached_batches(key: str, model: str) -> RememberedBatches:
    """The data of a key in batches, for the model of another."""
    data = cached_data(key, model)
    data.prepare_data()
    data.setup("predict")
    return RememberedBatches(data.predict_dataloader())


def _config(key: str) -> DictConfig:
    config = OmegaConf.create(json.loads(key)[0])
    assert isinstance(config, DictConfig)
    return config
