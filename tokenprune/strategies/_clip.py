"""How like a question patches are, by the CLIP model whose vision tower has seen them.

Shape suffixes: B batch rows, V visual tokens alive, C width of the tower, M pieces of a question.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor


def likeness(
    states_BVC: Tensor, question: Sequence[Sequence[int]], clip: str, tokenizer: str
) -> Tensor:
    """Cosines of patches and questions in CLIP's common space, float32 (B, V).

    A question that is longer than CLIP's text tower reads is cut into pieces, which are embedded
    one by one; the cosine is their mean.

    Args:
        states_BVC: Hidden states of the tower, before its last norm.
        question: Of each row, ids of the model's own tokenizer.
        clip: Hub id or folder of the CLIP model, with its tokenizer.
        tokenizer: Hub id or folder of the model's own tokenizer.

    Raises:
        ValueError: If the CLIP model's vision tower has another width than these states.
        OSError: If there is no such model or tokenizer.
    """
    import torch
    from torch.nn.functional import normalize

    model, own = _model(clip, states_BVC.device), _tokenizer(tokenizer)
    width = model.config.vision_config.hidden_size
    if states_BVC.shape[2] != width:
        raise ValueError(
            f"CDPruner.clip: expected the CLIP model whose vision tower the model has, of width "
            f"{states_BVC.shape[2]}, got {clip!r}, of width {width}. Name that one."
        )
    rows = []
    with torch.no_grad():
        for states_VC, ids in zip(states_BVC, question, strict=True):
            text = own.decode(list(ids), skip_special_tokens=True).strip()
            normed = model.vision_model.post_layernorm(states_VC.float())
            patches = normalize(model.visual_projection(normed), dim=-1)
            pieces = normalize(_embedded(model, _tokenizer(clip), text), dim=-1)  # (M, E)
            rows.append((patches @ pieces.T).mean(1))
    return torch.stack(rows)


def _embedded(model: Any, tokenizer: Any, text: str) -> Tensor:
    """A text's embeddings, (M, E): of as many pieces as it has, the last filled up with zeros."""
    import torch

    length = model.config.text_config.max_position_embeddings
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], device=model.device)
    missing = -len(ids) % length
    pieces = torch.nn.functional.pad(ids, (0, missing)).view(-1, length)
    output = model.get_text_features(input_ids=pieces)
    embedded: Tensor = getattr(output, "pooler_output", output)  # a tensor up to transformers 4
    return embedded


@cache
def _model(path: str, device: torch.device) -> Any:
    """A CLIP model in float32, loaded once a process and device."""
    import torch
    from transformers import CLIPModel

    model: Any = CLIPModel.from_pretrained(path, dtype=torch.float32)
    return model.eval().to(device)


@cache
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
