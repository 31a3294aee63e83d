"""Page tables packed for attention: flat int32 tensors, checked when built.

    page_size 16                                  FlashInferPackedData
    sequence 0   pages 0 1 2 5   58 tokens        kv_page_indices   [0 1 2 5 | 9]
    sequence 1   page  9          5 tokens        kv_page_indptr    [0 4 5]       where each sequence begins; the end
                                                  kv_last_page_len  [10 5]        tokens in each last page

Hybrid data is a list of levels. A level cuts the batch's rows into groups of neighbours; each group reads one list of
pages. The last level has a group for each sequence, the levels above it the runs that sequences share, or most of a
long one:

    rows       0   1   2   3
    level 0   [ 0 1 2 ]  [ ]      FlashInferHybridData.levels[0].qo_indptr [0 3 4], kv_page_indptr [0 3 3]
    level 1   [5] [6] [7] [9]     FlashInferHybridData.levels[1].qo_indptr [0 1 2 3 4], kv_page_indptr [0 1 2 3 4]

Invariants (`check()`; the constructors refuse what breaks B1 and B2):

- B1 an indptr is int32, one longer than what it counts, starts at 0, never decreases and ends at the count.
- B2 `1 <= last_page_len <= page_size`; 0 for a sequence or group without pages.
- B3 `unpack()` gives back what was packed.
- K2 every level's `qo_indptr` covers all rows; the boundaries of a level are boundaries of the next one too; the last
  level has one group with pages for each sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from attrs import define

from seqattn.errors import LengthError, TensorError
from seqattn.indptr import as_invariant, group_lengths, to_numpy, validate_indptr, validate_last, validate_pages

if TYPE_CHECKING:
    import numpy.typing as npt

    from seqattn.pages import PageArray

    Made = TypeVar("Made")

__all__ = ["FlashInferHybridData", "FlashInferPackedData", "HybridLevel"]


@define(slots=True, frozen=True, eq=False)
class FlashInferPackedData:
    """The page tables of a batch, as attention and `append_kv` read them; drawn at the top of this file.

    Building one checks B1 and B2 (all but the page size, which it does not know): O(pages), and a wait for the device
    if a tensor is not on the CPU. Planning reads `kv_page_indptr` and `kv_last_page_len` on the CPU: keep them there.
    The pages stay the property of the sequences: packed data holds no reference, and is void once a table changes.

    Attributes:
        kv_page_indices: page numbers, int32 [pages of all sequences].
        kv_page_indptr: where each sequence's pages begin, int32 [batch + 1].
        kv_last_page_len: tokens in each sequence's last page, int32 [batch].

    Raises:
        TensorError: not an int32 tensor with one axis.
        LengthError: values that break B1 or B2.
    """

    kv_page_indices: torch.Tensor
    kv_page_indptr: torch.Tensor
    kv_last_page_len: torch.Tensor

    def __attrs_post_init__(self) -> None:
        self.validate()

    @classmethod
    def trusted(
        cls, kv_page_indices: torch.Tensor, kv_page_indptr: torch.Tensor, kv_last_page_len: torch.Tensor
    ) -> FlashInferPackedData:
        """The same object without the checks, for builders whose output is right by construction."""
        return _unchecked(cls, kv_page_indices, kv_page_indptr, kv_last_page_len)

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return len(self.kv_last_page_len)

    def num_tokens(self, page_size: int) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, int64 [batch] on the CPU."""
        return group_lengths(to_numpy(self.kv_page_indptr), to_numpy(self.kv_last_page_len), page_size)

    def to_device(self, device: torch.device | str | int, non_blocking: bool = True) -> FlashInferPackedData:  # noqa: FBT001, FBT002  as in 0.0.2
        """The same data with every tensor on `device`; a tensor that is there already is shared, not copied."""
        tensors = (self.kv_page_indices, self.kv_page_indptr, self.kv_last_page_len)
        return self.trusted(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))

    def unpack(self) -> list[tuple[PageArray, int]]:
        """Each sequence's pages (int32) and last_page_len: what was packed (B3)."""
        pages = np.split(to_numpy(self.kv_page_indices), to_numpy(self.kv_page_indptr)[1:-1])[: self.num_sequences]
        return list(zip(pages, to_numpy(self.kv_last_page_len).tolist(), strict=True))

    def validate(self, page_size: int | None = None) -> None:
        """Refuses what breaks B1 or B2; with a page size its upper bound too. Raises TensorError or LengthError."""
        validate_pages(self.kv_page_indices, self.kv_page_indptr, self.kv_last_page_len)
        validate_last(self.kv_page_indptr, self.kv_last_page_len, page_size)

    def check(self, page_size: int | None = None) -> None:
        """Recomputes B1 and B2 (its upper bound only if `page_size` is given); raises InvariantError."""
        with as_invariant("B1"):
            validate_pages(self.kv_page_indices, self.kv_page_indptr, self.kv_last_page_len)
        with as_invariant("B2"):
            validate_last(self.kv_page_indptr, self.kv_last_page_len, page_size)


@define(slots=True, frozen=True, eq=False)
class HybridLevel:
    """One level of hybrid data: groups of neighbouring rows, and the pages that each group reads.

    Attributes:
        qo_indptr: where each group's rows begin, int32 [groups + 1].
        kv_page_indptr: where each group's pages begin, int32 [groups + 1].
        kv_page_indices: page numbers, int32 [pages of all groups].
        kv_last_page_len: tokens in each group's last page, int32 [groups]; 0 for a group without pages.

    Raises:
        TensorError: not an int32 tensor with one axis.
        LengthError: values that break B1 or B2.
    """

    qo_indptr: torch.Tensor
    kv_page_indptr: torch.Tensor
    kv_page_indices: torch.Tensor
    kv_last_page_len: torch.Tensor

    def __attrs_post_init__(self) -> None:
        self.validate()

    @classmethod
    def trusted(
        cls,
        qo_indptr: torch.Tensor,
        kv_page_indptr: torch.Tensor,
        kv_page_indices: torch.Tensor,
        kv_last_page_len: torch.Tensor,
    ) -> HybridLevel:
        """The same object without the checks, for builders whose output is right by construction."""
        return _unchecked(cls, qo_indptr, kv_page_indptr, kv_page_indices, kv_last_page_len)

    @property
    def num_groups(self) -> int:
        """Groups in the level, those without pages included."""
        return len(self.kv_last_page_len)

    @property
    def num_rows(self) -> int:
        """Query rows that the level covers; a wait for the device if `qo_indptr` is not on the CPU."""
        return int(self.qo_indptr[-1])

    def to_device(self, device: torch.device | str | int, non_blocking: bool = True) -> HybridLevel:  # noqa: FBT001, FBT002  as packed data
        """The same level with every tensor on `device`."""
        tensors = (self.qo_indptr, self.kv_page_indptr, self.kv_page_indices, self.kv_last_page_len)
        return self.trusted(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))

    def validate(self, page_size: int | None = None) -> None:
        """Refuses what breaks B1 or B2; with a page size its upper bound too. Raises TensorError or LengthError."""
        validate_pages(self.kv_page_indices, self.kv_page_indptr, self.kv_last_page_len)
        validate_indptr("qo_indptr", self.qo_indptr, self.num_groups)
        validate_last(self.kv_page_indptr, self.kv_last_page_len, page_size)


@define(slots=True, frozen=True, eq=False)
class FlashInferHybridData:
    """A batch as levels of shared and unique pages; drawn at the top of this file.

    Attributes:
        levels: coarsest first; the last one has a group for each sequence. One level alone is the plain batch.
        order: int64 [batch], on the CPU: the i-th sequence in group order is number `order[i]` of the caller's batch.

    Raises:
        TensorError: no level, or an `order` that is not int64 on the CPU.
        LengthError: an `order` that is not a permutation of the last level's groups.
    """

    levels: tuple[HybridLevel, ...]
    order: torch.Tensor

    def __attrs_post_init__(self) -> None:
        if not self.levels or not all(isinstance(level, HybridLevel) for level in self.levels):
            raise TensorError(f"levels must be one HybridLevel or more, not {self.levels!r}")
        object.__setattr__(self, "levels", tuple(self.levels))
        order = self.order
        if not isinstance(order, torch.Tensor) or order.dtype != torch.int64 or order.device.type != "cpu":
            raise TensorError(f"order must be an int64 tensor on the CPU, not {order!r}")
        if sorted(order.tolist()) != list(range(self.levels[-1].num_groups)):
            raise LengthError(
                f"order {order.tolist()} does not name each of the {self.levels[-1].num_groups} sequences once"
            )

    @classmethod
    def trusted(cls, levels: tuple[HybridLevel, ...], order: torch.Tensor) -> FlashInferHybridData:
        """The same object without the checks, for builders whose output is right by construction."""
        return _unchecked(cls, levels, order)

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return self.levels[-1].num_groups

    @property
    def num_rows(self) -> int:
        """Query rows of the batch; a wait for the device if the tensors are not on the CPU."""
        return self.levels[-1].num_rows

    def to_device(self, device: torch.device | str | int, non_blocking: bool = True) -> FlashInferHybridData:  # noqa: FBT001, FBT002  as packed data
        """The same data with every level on `device`; `order` stays on the CPU, where the caller permutes rows."""
        return self.trusted(tuple(level.to_device(device, non_blocking) for level in self.levels), self.order)

    def unpack(self) -> list[PageArray]:
        """Each sequence's pages over all levels, coarsest first, in the caller's order (K1)."""
        first_rows = to_numpy(self.levels[-1].qo_indptr)[:-1]
        parts: list[list[PageArray]] = [[] for _ in first_rows]
        for level in self.levels:
            pages, indptr = to_numpy(level.kv_page_indices), to_numpy(level.kv_page_indptr)
            # A group without rows begins where the next one does; `right` skips it.
            groups = np.searchsorted(to_numpy(level.qo_indptr), first_rows, side="right") - 1
            for part, group in zip(parts, groups.tolist(), strict=True):
                part.append(pages[indptr[group] : indptr[group + 1]])
        tables = [np.concatenate(part) for part in parts]
        return [tables[i] for i in np.argsort(to_numpy(self.order)).tolist()]

    def check(self, page_size: int | None = None) -> None:
        """Recomputes B1, B2 and K2; raises InvariantError naming the one that fails, with the levels drawn."""
        drawing = "\n".join(f"level {i}: {_drawn(level)}" for i, level in enumerate(self.levels))
        for level in self.levels:
            with as_invariant("B1", drawing):
                validate_pages(level.kv_page_indices, level.kv_page_indptr, level.kv_last_page_len)
                validate_indptr("qo_indptr", level.qo_indptr, level.num_groups)
            with as_invariant("B2", drawing):
                validate_last(level.kv_page_indptr, level.kv_last_page_len, page_size)
        with as_invariant("K2", drawing):
            _validate_k2(self)


def _unchecked(cls: type[Made], *values: object) -> Made:
    made = cls.__new__(cls)
    for name, value in zip(cls.__slots__, values, strict=False):  # type: ignore[attr-defined]  # the last slot is attrs' own
        object.__setattr__(made, name, value)
    return made


def _drawn(level: HybridLevel) -> str:
    return f"rows {level.qo_indptr.tolist()}, pages {level.kv_page_indptr.tolist()}, {level.kv_page_indices.tolist()}"


def _validate_k2(data: FlashInferHybridData) -> None:
    boundaries: set[int] = set()
    num_rows = data.num_rows
    for i, level in enumerate(data.levels):
        indptr = level.qo_indptr.tolist()
        if indptr[-1] != num_rows:
            raise LengthError(f"level {i} covers {indptr[-1]} of {num_rows} rows")
        if not boundaries <= set(indptr):
            missing = sorted(boundaries - set(indptr))
            raise LengthError(f"level {i} has no boundary at rows {missing}, where the level above has one")
        boundaries = set(indptr)
    if (np.diff(to_numpy(data.levels[-1].kv_page_indptr)) < 1).any():
        raise LengthError("the last level has a sequence without pages: its new tokens must lie there")
