"""What seqattn 0.0.2 gets wrong: each test passes here and fails there. Then its README, line by line.

To see the failures, run the same file against the published package:

    pip download --no-deps seqattn==0.0.2 && python -m zipfile -e seqattn-0.0.2-py3-none-any.whl OLD
    SEQATTN_UNDER_TEST=OLD python -m pytest tests/seqattn/test_regressions_0_0_2.py

Every test that is not named `test_readme_...` fails then. The package is loaded from that folder, with a stand-in for
flashinfer, which it imports unconditionally. So only names that 0.0.2 has are used below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from tests.seqattn import flashinfer_stand_in


def package_under_test() -> Any:  # noqa: ANN401  a module whose attributes differ between versions
    folder = os.environ.get("SEQATTN_UNDER_TEST")
    if folder is None:
        return import_module("seqattn")
    flashinfer_stand_in.install()
    for name in [name for name in sys.modules if name.partition(".")[0] == "seqattn"]:
        del sys.modules[name]
    sys.path.insert(0, str(Path(folder).resolve()))
    return import_module("seqattn")


seqattn = package_under_test()


def desk(num_pages: int = 8, page_size: int = 4) -> Any:  # noqa: ANN401  as above
    """A descriptor over a small cache on the CPU."""
    manager = seqattn.PagedKVCacheManager(num_pages, page_size, 1, 1, torch.float32, torch.device("cpu"))
    return seqattn.CacheDescriptor(manager)


def state(descriptor: Any) -> tuple[object, ...]:  # noqa: ANN401  as above
    tables = {i: (list(d.kv_page_indices), d.last_page_len) for i, d in descriptor.seq_id_to_data.items()}
    return tables, list(descriptor.cache_manager.ref_count), list(descriptor.cache_manager.free_pages)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


# -- append_kv ---------------------------------------------------------------------------------------------------------


def test_a_second_append_does_not_overwrite_the_first() -> None:
    """0.0.2 passes the number of new tokens as the length of the sequence, so they land at its beginning."""
    descriptor = desk()
    manager = descriptor.cache_manager
    written: list[float] = []
    for new in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0]):
        descriptor.allocate([0], [len(new)])
        packed = descriptor.pack_for_flashinfer([0])
        manager.append_kv(rows(*new), -rows(*new), packed, torch.tensor([0, len(new)], dtype=torch.int32))
        written += new
        pages = list(descriptor.seq_id_to_data[0].kv_page_indices)
        for memory, sign in zip(manager.get_memory_tensors(), (1, -1), strict=True):
            assert memory[pages].flatten()[: len(written)].tolist() == [sign * value for value in written]


# -- all or nothing ----------------------------------------------------------------------------------------------------


def test_a_decoding_step_without_pages_changes_nothing() -> None:
    """0.0.2 counts the new tokens before it asks for the pages."""
    descriptor = desk(num_pages=2)
    descriptor.allocate([0, 1], [4, 3])
    before = state(descriptor)
    with pytest.raises(seqattn.NoPageError):
        descriptor.allocate_decoding([0, 1])
    assert state(descriptor) == before


def test_allocate_refuses_an_id_named_twice() -> None:
    """0.0.2 plans both entries for a new sequence: five tokens end up as two pages of which the last holds two."""
    descriptor = desk()
    before = state(descriptor)
    with pytest.raises(ValueError, match="twice"):
        descriptor.allocate([0, 0], [3, 2])
    assert state(descriptor) == before


def test_allocate_decoding_refuses_an_id_named_twice() -> None:
    descriptor = desk()
    descriptor.allocate([0], [3])
    before = state(descriptor)
    with pytest.raises(ValueError, match="twice"):
        descriptor.allocate_decoding([0, 0])
    assert state(descriptor) == before


# -- silent misuse -----------------------------------------------------------------------------------------------------


def misuse(name: str) -> Callable[[Any, list[int]], object]:
    calls: dict[str, Callable[[Any, list[int]], object]] = {
        "ref of a free page": lambda manager, _: manager.ref([7]),
        "unref of a free page": lambda manager, _: manager.unref([7]),
        "unref below zero": lambda manager, pages: manager.unref([pages[0], pages[0]]),
        "release of a free page": lambda manager, _: manager.release_pages([7]),
        "a page released twice": lambda manager, pages: [manager.release_pages(pages) for _ in range(2)],
    }
    return calls[name]


@pytest.mark.parametrize(
    "name",
    [
        "ref of a free page",
        "unref of a free page",
        "unref below zero",
        "release of a free page",
        "a page released twice",
    ],
)
def test_misuse_of_a_reference_is_an_error(name: str) -> None:
    manager = desk().cache_manager
    pages = manager.allocate(2)
    with pytest.raises(ValueError, match="page"):
        misuse(name)(manager, pages)
    assert min(manager.ref_count) >= 0
    assert len(set(manager.free_pages)) == len(manager.free_pages)


def test_release_of_an_unknown_sequence_is_an_error_and_releases_nothing() -> None:
    descriptor = desk()
    descriptor.allocate([0], [5])
    before = state(descriptor)
    with pytest.raises(KeyError):
        descriptor.release([0, 1])
    assert state(descriptor) == before


def test_a_length_of_zero_is_an_error() -> None:
    """0.0.2 makes a sequence without pages whose last page is full."""
    descriptor = desk()
    with pytest.raises(ValueError, match="0"):
        descriptor.allocate([0], [0])
    assert not descriptor.seq_id_to_data


# -- heads, memory, layers, speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_kv_heads", [3, 5, 6, 12])
def test_head_ids_do_not_collide(num_kv_heads: int) -> None:
    """0.0.2 rounds the number of heads down to a power of two."""
    generator = seqattn.HeadIDGenerator(num_kv_heads=num_kv_heads)
    ids = [generator.get_head_id(seq_id, head) for seq_id in range(8) for head in range(num_kv_heads)]
    assert len(set(ids)) == len(ids)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that is not set holds NaN, instead of what happens to be there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_is_nan")
def test_unused_slots_hold_zeros() -> None:
    for memory in desk().cache_manager.get_memory_tensors():
        assert (memory == 0).all()


def test_a_cache_may_have_more_than_one_layer() -> None:
    manager = seqattn.PagedKVCacheManager(8, 4, 1, 1, torch.float32, "cpu", num_layers=3)
    assert list(manager.key_cache.shape) == [3, 8, 4, 1, 1]


def test_packing_is_not_a_loop_over_pages() -> None:
    """At least five times as fast as lists, for 64 sequences of 1,024 pages; the two are timed side by side."""
    descriptor = desk(num_pages=64 * 1024, page_size=1)
    ids = list(range(64))
    descriptor.allocate(ids, [1024] * 64)
    tables = [list(descriptor.seq_id_to_data[i].kv_page_indices) for i in ids]

    def in_lists() -> None:
        flat: list[int] = []
        for table in tables:
            flat.extend(table)
        torch.tensor(flat, dtype=torch.int32)

    slow, fast = [], []
    for i in range(10):
        turned = ids[i:] + ids[:i]  # another batch each time, so that nothing packed before can be used again
        slow.append(seconds(in_lists))
        fast.append(seconds(lambda turned=turned: descriptor.pack_for_flashinfer(turned)))  # type: ignore[misc]  # bound now
    assert min(fast) < min(slow) / 5


def seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


# -- the README of 0.0.2 -----------------------------------------------------------------------------------------------


def test_readme_quick_start_and_advanced_usage() -> None:
    """Every line, on the CPU: only `device` differs."""
    from seqattn import CacheDescriptor, HeadIDGenerator, PagedKVCacheManager

    cache_manager = PagedKVCacheManager(
        num_pages=1024, page_size=16, num_heads=32, head_dim=128, dtype=torch.float16, device=torch.device("cpu")
    )
    descriptor = CacheDescriptor(cache_manager)
    seq_ids = [1, 2, 3]
    seq_lengths = [100, 150, 80]
    descriptor.allocate(seq_ids, seq_lengths)
    flashinfer_data = descriptor.pack_for_flashinfer(seq_ids)
    shared_pages = [0, 1, 2]
    cache_manager.ref(shared_pages)
    head_gen = HeadIDGenerator(num_kv_heads=32)
    head_id = head_gen.get_head_id(seq_id=1, head_idx=5)

    assert flashinfer_data.kv_page_indptr.tolist() == [0, 7, 17, 22]
    assert flashinfer_data.kv_page_indices.tolist() == list(range(22))
    assert flashinfer_data.kv_last_page_len.tolist() == [4, 6, 16]
    assert cache_manager.ref_count[:4].tolist() == [2, 2, 2, 1]
    assert head_id == 37


def test_readme_api_reference() -> None:
    """The calls of its last part, with head ids in the place of sequence ids."""
    descriptor = desk()
    manager = descriptor.cache_manager
    pages = manager.allocate(2)
    manager.ref(pages)
    manager.unref(pages)
    manager.release_pages(pages)
    assert manager.available_pages_count == 8
    heads = [seqattn.HeadIDGenerator(2).get_head_id(seq_id, head) for seq_id in (0, 1) for head in (0, 1)]
    descriptor.allocate(heads, [1, 1, 4, 4])
    descriptor.allocate_decoding(heads)
    packed = descriptor.pack_for_flashinfer(heads).to_device(torch.device("cpu"))
    indptr = torch.tensor([0, 2, 4, 9, 14], dtype=torch.int32)
    manager.append_kv(rows(*map(float, range(14))), rows(*map(float, range(14))), packed, indptr)
    assert packed.kv_last_page_len.tolist() == [2, 2, 1, 1]
    descriptor.release(heads)
    assert manager.available_pages_count == 8
