"""Head ids: one for each pair, and those of 0.0.2 where 0.0.2 was right."""

from __future__ import annotations

import pytest

from seqattn.errors import BadValueError
from seqattn.heads import HeadIDGenerator


@pytest.mark.parametrize("num_kv_heads", range(1, 20))
def test_no_two_heads_have_the_same_id(num_kv_heads: int) -> None:
    generator = HeadIDGenerator(num_kv_heads)
    ids = [generator.get_head_id(seq_id, head) for seq_id in range(50) for head in range(num_kv_heads)]
    assert len(set(ids)) == 50 * num_kv_heads


@pytest.mark.parametrize("power", range(8))
def test_a_power_of_two_heads_gives_the_ids_of_0_0_2(power: int) -> None:
    generator = HeadIDGenerator(num_kv_heads=2**power)
    for seq_id in (0, 1, 7, 2**40):
        for head in range(2**power):
            assert generator.get_head_id(seq_id=seq_id, head_idx=head) == (seq_id << power) | head


def test_the_ids_of_the_picture() -> None:
    generator = HeadIDGenerator(3)
    assert [[generator.get_head_id(seq_id, head) for head in range(3)] for seq_id in range(2)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("num_kv_heads", [0, -1, 2.0, True, "8"])
def test_a_number_of_heads_must_be_positive(num_kv_heads: int) -> None:
    with pytest.raises(BadValueError, match=repr(num_kv_heads)):
        HeadIDGenerator(num_kv_heads)


@pytest.mark.parametrize(
    ("seq_id", "head_idx", "shown"), [(0, 4, "4"), (0, -1, "-1"), (0, 1.0, "1.0"), ("a", 0, "'a'")]
)
def test_a_head_that_does_not_exist_is_refused(seq_id: int, head_idx: int, shown: str) -> None:
    with pytest.raises(BadValueError, match=shown):
        HeadIDGenerator(4).get_head_id(seq_id, head_idx)
