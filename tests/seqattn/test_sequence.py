"""What `SequenceData` takes for a page table and for a length, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from seqattn.errors import LengthError, PageError
from seqattn.sequence import SequenceData


@pytest.mark.parametrize("pages", [[7, 2], (7, 2), np.array([7, 2], dtype=np.uint64), torch.tensor([7, 2])], ids=repr)
def test_a_page_table_may_be_anything_that_holds_integers(pages: Any) -> None:  # noqa: ANN401  that is the point
    assert SequenceData(pages, np.int64(3)) == SequenceData([7, 2], 3)  # type: ignore[arg-type]  # numpy's integers too


def test_a_page_table_is_a_copy() -> None:
    pages = np.array([7, 2], dtype=np.int32)
    sequence = SequenceData(pages, 1)
    pages[0] = 5
    assert sequence.kv_page_indices == [7, 2]


def test_the_largest_page_number_is_one() -> None:
    assert SequenceData([2**31 - 1, 0], 1).kv_page_indices == [2**31 - 1, 0]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([[1], [1, 2]], "must be a flat list of integers"),
        ([[1, 2]], "must be a flat list of integers"),
        (7, "must be a flat list of integers, not 7"),
        ([0.5], r"must be a flat list of integers, not \[0\.5\]"),
        ([True], "must be a flat list of integers"),
        (["a"], "must be a flat list of integers"),
        (torch.ones(1, dtype=torch.bfloat16), "must be a flat list of integers"),
        ([2**70], "must be a flat list of integers"),
        ([3, 2**32 + 5], r"page 4294967301 is not in \[0, 2\*\*31\)"),
        (np.array([2**63], dtype=np.uint64), "page 9223372036854775808 is not in"),
        ([3, -1], "page -1 is not in"),
        (np.array([-2], dtype=np.int32), "page -2 is not in"),
    ],
    ids=repr,
)
def test_what_is_no_page_table_is_refused(pages: Any, message: str) -> None:  # noqa: ANN401  anything may be passed
    with pytest.raises(PageError, match=message):
        SequenceData(pages, 1)


@pytest.mark.parametrize(("pages", "last"), [([0], "1"), ([0], 1.5), ([0], True), ([0], None), ([], -1), ([0], 0)])
def test_what_is_no_length_of_a_last_page_is_refused(pages: list[int], last: Any) -> None:  # noqa: ANN401  as above
    with pytest.raises(LengthError, match=f"last_page_len {last!r} does not fit {len(pages)} pages"):
        SequenceData(pages, last)
