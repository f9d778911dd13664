"""SparseVLM: Zhang et al., 2024, arXiv 2410.04417 (ICML 2025).

Raters are the text tokens after the image that the image is most like, by their embeddings; a token
is worth what they pay it in the layer before the cut. As in the released code's version 1.5 some of
the dropped tokens are recycled: the better three tenths are clustered (DPC-kNN) to a tenth of their
number, and each cluster's mean stands behind the tokens that stay. The budget counts both: the
released lists 300, 200, 110 are 309, 204, 113 here. Version 2.0 merges nothing: it divides
attention by what rotary positions alone would give, and hears the 14 heads that look at the image
most. Version 1.0 recycles, too, and how many tokens it keeps follows the image: `scale` times the
rank of what raters pay the tokens, plus `bias`, before layers 3, 7, 16 and 20; of LLaVA-1.5's 576
tokens 13.5 and 0 leave 192 on average, 9 and 6 leave 128, 0.8 and 0 leave 64. The schedule is then
an upper bound, clusters included (a cut that may keep all tokens keeps them).

Departures. The engine moves no token to a new seat: kept and merged tokens, in that order, take the
seats of the kept ones and of the last dropped ones (positions are counted anew, as published; with
original ones a kept token behind a filled seat has the position of the seat that it moves to).
Means of attention are float32. The released code adds noise of 1e-6 to the density; here there is
none, and ties go to the lower index, which decides where there is one cluster only. Where no text
token exceeds the mean, all rate; a row that loses tokens and has no text after its last image is
refused, since text before an image pays it nothing. Version 2.0's divisor turns negative beyond a
distance of 1706 (base 10000, heads of 128): longer prompts are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, TypeVar

from tokenprune.strategy import (
    DecoderRows,
    Entered,
    Need,
    PruningStrategy,
    Published,
    Selection,
    Text,
    TokenView,
    Words,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

    Number = TypeVar("Number", Tensor, int)

VERSIONS = ("1.0", "1.5", "2.0")


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(PruningStrategy):
    """Keeps what the words most like the image attend to, and clusters of the best of the rest.

    Args:
        version: Of the released code, `"1.0"`, `"1.5"` or `"2.0"`; as a number, too.
        scale: Version 1.0: tokens kept per rank.
        bias: Version 1.0: tokens kept besides.
        theta: Version 2.0: base of the model's rotary positions.
        head_dim: Version 2.0: width of the model's heads.
    """

    keeps_exactly: ClassVar[bool] = True

    version: str = "1.5"
    scale: float = 13.5
    bias: float = 0.0
    theta: float = 10_000.0
    head_dim: int = 128

    def __post_init__(self) -> None:
        given: object = self.version
        if isinstance(given, float | int):  # as YAML and shells make of it
            object.__setattr__(self, "version", str(float(given)))
        if self.version not in VERSIONS:
            raise ValueError(
                f"SparseVLM.version: expected one of {list(VERSIONS)}, got {self.version!r}. "
                "Name one of the released code's."
            )
        if self.scale < 0 or self.bias < 0:
            raise ValueError(
                f"SparseVLM.scale, bias: expected numbers of at least 0, got {self.scale!r} and "
                f"{self.bias!r}. They say how many tokens stay per rank, and besides."
            )
        object.__setattr__(self, "keeps_exactly", self.version != "1.0")

    def needs(self) -> tuple[Need, ...]:
        return (Entered(), Text(), Words(follow=True), DecoderRows("text", "previous"))

    def select(self, view: TokenView, keep: Tensor) -> Selection:
        from tokenprune.tensors import top_k

        raters_BS, attention_BHSV = _raters(view), view.attend("text", "previous")
        if self.version == "1.5":
            return _recycle(view, _mean(raters_BS, attention_BHSV), keep)
        if self.version == "1.0":
            most_B = self._by_rank(view, raters_BS, attention_BHSV)
            return _recycle(view, _mean(raters_BS, attention_BHSV), keep, most_B)
        attention_BHSV = attention_BHSV / self._bias(view)[:, None]
        loudest_BHSV = _loudest(raters_BS, attention_BHSV * view.valid[:, None, None])
        scores_BV = _mean(raters_BS, loudest_BHSV)
        return Selection(top_k(scores_BV, view.valid, keep), scores=scores_BV)

    def _by_rank(self, view: TokenView, raters_BS: Tensor, attention_BHSV: Tensor) -> Tensor:
        """How many tokens stay as they are, int64 (B,): by the rank of raters times tokens."""
        import torch

        paid_BSV = attention_BHSV.mean(1) * raters_BS[..., None] * view.valid[:, None]
        longest_B = torch.maximum(raters_BS.sum(1), view.valid.sum(1))
        # The usual tolerance of each row's own matrix, whatever it is filled up to.
        tolerance_B = longest_B * torch.finfo(paid_BSV.dtype).eps
        rank_B = torch.linalg.matrix_rank(paid_BSV, rtol=tolerance_B)
        most_B: Tensor = (self.scale * rank_B.double() + self.bias).long()
        return most_B

    def _bias(self, view: TokenView) -> Tensor:
        """What rotary positions alone make of a query and a key of ones, (B, S, V)."""
        import torch

        longest = view.entered.shape[1] + view.text.embeddings.shape[1]
        reach = _reach(self.theta, self.head_dim)
        if longest > reach:
            raise ValueError(
                f"SparseVLM: expected prompts of at most {reach} tokens for version 2.0, whose "
                f"divisor turns negative beyond that, got {longest}. Use version 1.5."
            )
        apart_BSV = (view.text.positions[..., None] - view.positions[:, None]).clamp(0, reach)
        bias = torch.tensor(
            _biases(self.theta, self.head_dim, reach),
            dtype=torch.float32,
            device=apart_BSV.device,
        )
        return bias[apart_BSV]

    @classmethod
    def published(cls, num_layers: int) -> Published:
        # Version 1.5 counts positions anew; version 2.0 leaves them.
        stages = ((3, 0.5365), (7, 0.3542), (16, 0.1962))
        options = {"stages": stages, "of_layers": 32, "rounding": "nearest"}
        return Published("explicit", {**options, "num_layers": num_layers}, positions="renumbered")


def _raters(view: TokenView) -> Tensor:
    """Text tokens that rate, 0 or 1, (B, S): chosen once, by all visual tokens of the call."""
    import torch

    words_BS, image_BUD = view.text.follows, view.entered.float()
    exists_BU = (
        torch.arange(image_BUD.shape[1], device=words_BS.device) < view.num_original[:, None]
    )
    alike_BUS = (image_BUD @ view.text.embeddings.float().mT).masked_fill(
        ~words_BS[:, None], -torch.inf
    )
    share_BUS = torch.nan_to_num(alike_BUS.softmax(-1)) * exists_BU[..., None]
    share_BS = share_BUS.sum(1)
    mean_B1 = share_BS.sum(1, keepdim=True) / words_BS.sum(1, keepdim=True).clamp_min(1)
    above_BS = words_BS & (share_BS > mean_B1)
    return torch.where(above_BS.any(1, keepdim=True), above_BS, words_BS).float()


def _mean(raters_BS: Tensor, attention_BHSV: Tensor) -> Tensor:
    """Mean over heads and raters, (B, V)."""
    import torch

    total_BV = torch.einsum("bhsv,bs->bv", attention_BHSV, raters_BS)
    return total_BV / (attention_BHSV.shape[1] * raters_BS.sum(1, keepdim=True).clamp_min(1))


def _loudest(raters_BS: Tensor, attention_BHSV: Tensor, number: int = 14) -> Tensor:
    """The heads in which raters pay the image most."""
    import torch

    from tokenprune.tensors import take

    total_BH = torch.einsum("bhsv,bs->bh", attention_BHSV, raters_BS)
    order_BH = total_BH.argsort(dim=1, descending=True, stable=True)
    return take(attention_BHSV, order_BH[:, :number])


@cache
def _reach(theta: float, head_dim: int) -> int:
    """The distance up to which all biases are positive; 32767 at most."""
    return next(
        (apart - 1 for apart in range(2**15) if _biases_at(theta, head_dim, apart) <= 0), 2**15 - 1
    )


@cache
def _biases(theta: float, head_dim: int, reach: int) -> tuple[float, ...]:
    return tuple(_biases_at(theta, head_dim, apart) for apart in range(reach + 1))


def _biases_at(theta: float, head_dim: int, apart: int) -> float:
    """(2 / sqrt(E)) sum_i cos(distance * theta ** (-2i / E))."""
    angles = (apart * theta ** (-pair / head_dim) for pair in range(0, head_dim, 2))
    return 2 / math.sqrt(head_dim) * sum(map(math.cos, angles))


# ---------------------------------------------------------------- versions 1.0 and 1.5: merging


def _recycle(
    view: TokenView, scores_BV: Tensor, keep: Tensor, most_B: Tensor | None = None
) -> Selection:
    """Keeps the best tokens and clusters of the better dropped ones, `keep` in all.

    With `most_B`, int64 (B,), at most so many tokens and not all of them, and as many clusters as
    the others make, unless a row may keep all that it ever had.

    Shape suffixes: M members of clusters, C clusters.
    """
    import torch

    from tokenprune.tensors import ascending, mixture, take, top_k

    valid_BV = view.valid
    width, device = valid_BV.shape[1], keep.device
    most_members = min(width, _members(width))
    most_clusters = _clusters(width)
    alive_B = valid_BV.sum(1)
    total_B = torch.minimum(keep, alive_B)
    whole_B = total_B == alive_B
    single_B = _singles(alive_B, total_B, width)
    if most_B is not None:
        whole_B = keep >= view.num_original
        few_B = torch.minimum(single_B, torch.minimum(most_B, alive_B - 1).clamp_min(0))
        few_total_B = torch.minimum(total_B, few_B + _clusters(alive_B - few_B))
        single_B = torch.where(whole_B, single_B, few_B)
        total_B = torch.where(whole_B, total_B, few_total_B)
    whole_B1 = whole_B[:, None]
    clusters_B1 = (total_B - single_B)[:, None]
    kept_BV = top_k(scores_BV, valid_BV, single_B)
    dropped_BV = valid_BV & ~kept_BV
    chosen_BV = top_k(scores_BV, dropped_BV, _members(alive_B - single_B))
    members_BM = ascending(chosen_BV, most_members)
    exists_BM = chosen_BV.gather(1, members_BM)
    cluster_BM = _cluster(take(view.hidden, members_BM), exists_BM, clusters_B1, most_clusters)

    sizes_BC = torch.zeros(len(keep), most_clusters, dtype=torch.float32, device=device)
    sizes_BC = sizes_BC.scatter_add(1, cluster_BM, exists_BM.float())
    part_BM = exists_BM / sizes_BC.gather(1, cluster_BM).clamp_min(1)
    row_BV = kept_BV.cumsum(1) - 1
    row_BV = row_BV.scatter(1, members_BM, torch.where(
        exists_BM, single_B[:, None] + cluster_BM, row_BV.gather(1, members_BM)))  # fmt: skip
    share_BV = kept_BV.float()
    share_BV = share_BV.scatter(1, members_BM, part_BM + share_BV.gather(1, members_BM))
    from_end_BV = dropped_BV.flip(1).cumsum(1).flip(1)
    seats_BV = kept_BV | (dropped_BV & (from_end_BV <= clusters_B1))
    # A row that loses nothing has one cluster of one token, which stays where it is.
    row_BV = torch.where(whole_B1, torch.arange(width, device=device), row_BV)
    return Selection(seats_BV, weights=mixture(row_BV, share_BV, view.max_keep))


def _members(dropped: Number) -> Number:
    """Dropped tokens that are clustered: int(0.3 n) + 1."""
    return 3 * dropped // 10 + 1


def _clusters(dropped: Number) -> Number:
    """Clusters that they make: int(m / 10) + 1."""
    return _members(dropped) // 10 + 1


def _singles(alive_B: Tensor, total_B: Tensor, width: int) -> Tensor:
    """Tokens that stay as they are, so that they and the clusters of the others are `total`."""
    import torch

    dropped_V = torch.arange(1, width + 1, device=alive_B.device)
    single_BV = alive_B[:, None] - dropped_V
    fits_BV = (single_BV >= 0) & (single_BV + _clusters(dropped_V) <= total_B[:, None])
    # Fewer than the clusters of all tokens: clusters alone.
    return torch.where(fits_BV, single_BV, 0).amax(1)


def _cluster(
    hidden_BMD: Tensor, exists_BM: Tensor, clusters_B1: Tensor, most_clusters: int
) -> Tensor:
    """Cluster of each token, int64 (B, M), numbered by descending score of the centre (DPC-kNN)."""
    import torch

    num_members, device = hidden_BMD.shape[1], hidden_BMD.device
    # Exactly symmetric: equal distances stay equal.
    distance_BMM = torch.cdist(
        hidden_BMD.float(), hidden_BMD.float(), compute_mode="donot_use_mm_for_euclid_dist"
    ) / math.sqrt(hidden_BMD.shape[2])
    pairs_BMM = exists_BM[:, :, None] & exists_BM[:, None]
    near_BMM = distance_BMM.masked_fill(~pairs_BMM, torch.inf)
    order_M = torch.arange(num_members, device=device)
    # A token's nearest neighbours are as many as clusters, itself the first of them.
    counts_BM = (order_M < clusters_B1)[:, None]
    nearest_BMM = near_BMM.sort(-1).values.masked_fill(~counts_BM, 0)
    density_BM = (-(nearest_BMM**2).sum(-1) / clusters_B1.clamp_min(1)).exp()
    denser_BMM = pairs_BMM & (density_BM[:, None] > density_BM[:, :, None])
    apart_BM = near_BMM.masked_fill(~denser_BMM, torch.inf).amin(-1)
    largest_B1 = distance_BMM.masked_fill(~pairs_BMM, 0).amax((1, 2))[:, None]
    apart_BM = torch.where(apart_BM.isinf(), largest_B1, apart_BM)
    score_BM = torch.nan_to_num(density_BM * apart_BM).masked_fill(~exists_BM, -1)
    centres_BC = score_BM.argsort(dim=1, descending=True, stable=True)[:, :most_clusters]
    is_centre_BC = order_M[: centres_BC.shape[1]] < clusters_B1
    to_centre_BMC = near_BMM.gather(2, centres_BC[:, None].expand(-1, num_members, -1))
    cluster_BM = to_centre_BMC.masked_fill(~is_centre_BC[:, None], torch.inf).argmin(2)
    own_BC = order_M[: centres_BC.shape[1]].expand_as(centres_BC)
    return cluster_BM.scatter(
        1, centres_BC, torch.where(is_centre_BC, own_BC, cluster_BM.gather(1, centres_BC))
    )
