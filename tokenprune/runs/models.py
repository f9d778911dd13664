"""Loading of models and processors: the shipped one, a Hub id or a local folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
_ASSETS = Path(__file__).resolve().parents[1] / "assets"
#: The models inside the package, and the level of the generated scenes that each has learnt.
LEVELS = {"tiny": "easy", "small": "hard"}
SHIPPED = {name: _ASSETS / name for name in LEVELS}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with the processor that belongs to it."""

    model: PreTrainedModel
    processor: ProcessorMixin


def load(
    path: str,
    *,
    dtype: str = "auto",
    attention: str = "sdpa",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    processor: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads an image-text-to-text model; weights come from safetensors only.

    Args:
        path: `"tiny"` or `"small"` for a shipped model, a Hub id, or a local folder.
        dtype: `"auto"`, as stored, or a floating-point type's name.
        attention: `"eager"`, `"sdpa"` or `"flash_attention_2"`.
        device_map: As in transformers; None leaves the model on the CPU.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Runs code that comes with the checkpoint.
        processor: Options of the processor, such as `max_pixels` of Qwen-VL's.

    Raises:
        ValueError: If there is no such checkpoint, it is broken, or it is no image-text model.
    """
    check_choices(dtype, attention)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

    source = _resolve(path)
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if type(config) not in AutoModelForImageTextToText._model_mapping and not (
        trust_remote_code and hasattr(config, "auto_map")
    ):
        raise ValueError(
            f"model.path: expected a model that reads images and text into one decoder stream, got "
            f"{config.model_type!r} in {path!r}. Choose an image-text-to-text checkpoint."
        )
    try:
        reader: Any = AutoProcessor
        own = reader.from_pretrained(source, **options, **dict(processor or {}))
        builder: Any = AutoModelForImageTextToText
        model, report = builder.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever the many readers below make of a broken checkpoint
        raise ValueError(
            f"model.path: expected a complete checkpoint with safetensors weights and a processor, "
            f"got {path!r}: {_first_line(error)}. Fetch or save it again{_or_newest(revision)}."
        ) from error
    if not isinstance(own, ProcessorMixin):
        raise ValueError(
            f"model.path: expected a processor for images and text, got only a "
            f"{type(own).__name__} in {path!r}. Save the model's processor beside it."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills them with random numbers and goes on.
        raise ValueError(
            f"model.path: expected all weights of a {type(model).__name__}, got {path!r} without "
            f"{len(missing)} of them, such as {missing[0]!r}. Fetch or save it again."
        )
    model.eval().requires_grad_(False)
    return LoadedModel(model, own)


def check_choices(dtype: str, attention: str) -> None:
    """Refuses what no model can be loaded with; see `load`."""
    for name, value, choices in (("dtype", dtype, DTYPES), ("attention", attention, ATTENTIONS)):
        if value not in choices:
            raise ValueError(
                f"model.{name}: expected one of {list(choices)}, got {value!r}. "
                "See configs/model/hub.yaml."
            )


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config, without its weights.

    Raises:
        ValueError: If there is no such checkpoint or its config is broken.
    """
    from transformers import AutoConfig

    source = _resolve(path)
    try:
        return AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model.path: expected a model that transformers knows, got {path!r}, whose Python "
                "code comes with the checkpoint. If you trust it, add model.trust_remote_code=true."
            ) from error
        raise ValueError(
            f"model.path: expected a Hub id or a folder with a readable config.json, got {path!r}: "
            f"{_first_line(error)}. Check the name and the connection{_or_newest(revision)}."
        ) from error


def _resolve(path: str) -> str:
    """Hub id or folder; local folders are checked before transformers asks the Hub for them."""
    if not isinstance(path, str) or not path:
        raise ValueError(
            f"model.path: expected a Hub id or a folder, got {path!r}. "
            "Add model.path=llava-hf/llava-1.5-7b-hf, or a folder."
        )
    if path in SHIPPED:
        if not (SHIPPED[path] / "config.json").is_file():
            raise ValueError(
                f"model.path: expected the shipped model in {SHIPPED[path]}, got no such folder. "
                "Install tokenprune again."
            )
        return str(SHIPPED[path])
    folder = Path(path).expanduser()
    local = folder.is_dir() or folder.is_absolute() or path.startswith((".", "~"))
    if not local:
        return path
    if not folder.is_dir():
        raise ValueError(
            f"model.path: expected a folder, got {path!r}, which does not exist. "
            "Check the path; a Hub id has the form owner/name."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path: expected a checkpoint with config.json, got {path!r} without one. "
            "Point to the folder that save_pretrained wrote."
        )
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"model.path: expected a readable config.json, got {path!r}: {_first_line(error)}. "
            "Fetch or save the checkpoint again."
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model.path: expected weights in safetensors files, got none in {path!r}. "
            "Convert them with save_pretrained; pickled weights can run code and are refused."
        )
    return str(folder)


def _or_newest(revision: str | None) -> str:
    """What else may help where a revision is pinned, as in most files of configs/model."""
    if revision is None:
        return ""
    return f", or take another commit than {revision}: model.revision=null is the newest"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
