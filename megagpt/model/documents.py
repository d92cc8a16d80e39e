"""Documents inside the samples of a micro-batch: which tokens see each other, and what position each one has.

Shapes: B samples of a micro-batch, S sequence (whole), s this context-parallel rank's part of it, N query heads of this
rank, G its key/value heads, D channels per head, T = B S tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.model.causal_attention import causal_attention
from megagpt.model.varlen import attend_at_once, kernel_of_runs

PADDING = -1
"""Place in its document of a token that fills up a sample."""
Runs = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in a micro-batch. The host knows it, so that nothing waits for the device."""

    runs: Runs | None
    """Lengths of the documents of each sample, one after the other; padding behind them belongs to none. None: tokens
    attend across borders."""
    starts: Tensor | None
    """The same for a kernel: where each run of tokens (padding too) begins among all T, and T; int32 [runs + 1]."""
    positions_Bs: Tensor | None
    """Position of each token in its document, int64, this context-parallel rank's; None: as in a sample without
    borders."""
    padding_Bs: Tensor | None
    """True for padding, this context-parallel rank's; None: there is none."""

    @classmethod
    def of(
        cls,
        places_BS: Tensor,
        device: torch.device,
        *,
        attention: bool,
        positions: bool,
        padded: bool,
        part: tuple[int, int] = (0, 1),
    ) -> "Documents":
        """Find the borders.

        Args:
            places_BS: [B, S] int64 on the host: place of each token in its document, `PADDING` behind the last one.
            device: where the model is.
            attention: keep documents apart in attention.
            positions: count positions in documents.
            padded: samples may end with padding.
            part: this context-parallel rank, and their number.
        """
        rank, size = part
        mine_Bs = places_BS.chunk(size, 1)[rank]
        runs = _runs_of(places_BS) if attention else None
        return cls(
            runs=runs,
            starts=_sent(_starts_of(runs, places_BS.shape[1]), device) if runs else None,
            positions_Bs=_sent(mine_Bs.clamp(min=0), device) if positions else None,
            padding_Bs=_sent(mine_Bs == PADDING, device) if padded else None,
        )

    def padding_of(self, part: int, parts: int) -> Tensor | None:
        """The padding among one of so many equal parts of the positions."""
        return None if self.padding_Bs is None else self.padding_Bs.chunk(parts, 1)[part]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without that the host waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _runs_of(places_BS: Tensor) -> Runs:
    runs = []
    for places_S in places_BS:
        real = int((places_S != PADDING).sum())
        begins = torch.nonzero(places_S[:real] == 0).flatten().tolist()
        if begins[:1] != [0]:
            begins.insert(0, 0)
        runs.append(tuple(stop - start for start, stop in zip(begins, [*begins[1:], real], strict=True)))
    return tuple(runs)


def _starts_of(runs: Runs, length: int) -> Tensor:
    starts = [0]
    for row, lengths in enumerate(runs, 1):
        for size in lengths:
            starts.append(starts[-1] + size)
        if starts[-1] < row * length:
            starts.append(row * length)
    return torch.tensor(starts, dtype=torch.int32)


def document_attention(
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    documents: Documents,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`causal_attention` in which each token sees tokens of its own document only; padding gives zeros, or anything.

    No mask is formed: what would be hidden is not computed. On GPUs one kernel takes all documents where torch has it;
    else they are attended to one after the other.

    Returns:
        [B, N, S, D].
    """
    assert documents.runs is not None, "else attention crosses borders"
    length = query_BNSD.shape[2]
    if all(lengths == (length,) for lengths in documents.runs):
        return causal_attention(query_BNSD, key_BGSD, value_BGSD, scale, dropout, window, softcap)
    kernel = kernel_of_runs(query_BNSD, dropout) if softcap is None else None
    if kernel is not None:
        assert documents.starts is not None, "of the same runs"
        return attend_at_once(kernel, query_BNSD, key_BGSD, value_BGSD, documents.starts, scale, window)
    rows = []
    parts = [x.split(1) for x in (query_BNSD, key_BGSD, value_BGSD)]
    for lengths, query_1NSD, key_1GSD, value_1GSD in zip(documents.runs, *parts, strict=True):
        padding = length - sum(lengths)
        sizes = [*lengths, padding] if padding else [*lengths]
        pieces = zip(*(x.split(sizes, 2) for x in (query_1NSD, key_1GSD, value_1GSD)), strict=True)
        contexts = [
            causal_attention(query, key, value, scale, dropout, window, softcap)
            for query, key, value in list(pieces)[: len(lengths)]
        ]
        if padding:
            contexts.append(torch.zeros_like(query_1NSD[:, :, :padding]))
        rows.append(torch.cat(contexts, 2))
    return torch.cat(rows)
