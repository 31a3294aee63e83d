"""The KV memory: appending and copying against slot-by-slot loops, and what both refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqattn.cache import PagedKVCacheManager
from seqattn.errors import BadValueError, TensorError
from seqattn.packed import FlashInferPackedData
from tests.seqattn.truth import int32, slot

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint16,
    torch.complex64,
    torch.complex128,
    torch.bool,
]


def cache(
    num_pages: int = 8,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    **more: Any,  # noqa: ANN401  the constructor's
) -> PagedKVCacheManager:
    return PagedKVCacheManager(num_pages, page_size, 2, 4, dtype, "cpu", **more)


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random [count, 2, 4] of any dtype: random bytes of small numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 16, (count, 2, 4), generator=generator).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal byte for byte."""
    return a.dtype == b.dtype and bool(
        (a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).all()
        if a.dtype != torch.bool
        else (a == b).all()
    )


def one_sequence(pages: list[int], num_tokens: int, page_size: int = 4) -> FlashInferPackedData:
    last = num_tokens - (len(pages) - 1) * page_size
    return FlashInferPackedData(int32(*pages), int32(0, len(pages)), int32(last))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_layout", "num_layers", "shape"),
    [
        ("NHD", 1, [8, 4, 2, 5]),
        ("HND", 1, [8, 2, 4, 5]),
        ("NHD", 3, [3, 8, 4, 2, 5]),
        ("HND", 3, [3, 8, 2, 4, 5]),
    ],
)
def test_the_memory_has_one_axis_for_each_size(kv_layout: str, num_layers: int, shape: list[int]) -> None:
    manager = PagedKVCacheManager(8, 4, 2, 5, torch.float32, "cpu", kv_layout, num_layers=num_layers)
    keys, values = manager.get_memory_tensors()
    assert keys is manager.key_cache
    assert values is manager.value_cache
    assert list(keys.shape) == list(values.shape) == shape
    assert list(manager.layer_tensors(num_layers - 1)[0].shape) == shape[-4:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_dtype_starts_as_zeros(dtype: torch.dtype) -> None:
    manager = cache(dtype=dtype)
    for tensor in manager.get_memory_tensors():
        assert tensor.dtype == dtype
        assert same(tensor, torch.zeros(tensor.shape, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_a_device_may_have_any_form(device: torch.device | str) -> None:
    manager = PagedKVCacheManager(2, 4, 1, 1, torch.float32, device)
    assert manager.device == torch.device(device) == manager.key_cache.device


@pytest.mark.gpu
def test_a_device_may_be_a_number() -> None:
    assert PagedKVCacheManager(2, 4, 1, 1, torch.float16, 0).device == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_heads": 0}, BadValueError, "num_heads must be an integer of at least 1, not 0"),
        ({"head_dim": -1}, BadValueError, "head_dim .* not -1"),
        ({"num_layers": 1.5}, BadValueError, r"num_layers .* not 1\.5"),
        ({"num_pages": 0}, BadValueError, "num_pages .* not 0"),
        ({"page_size": 0}, BadValueError, "page_size .* not 0"),
        ({"kv_layout": "DNH"}, BadValueError, "kv_layout must be 'NHD' or 'HND', not 'DNH'"),
        ({"dtype": "float16"}, TensorError, "dtype must be a torch.dtype, not 'float16'"),
        ({"dtype": np.float16}, TensorError, "dtype must be a torch.dtype"),
        ({"device": "gpu-7"}, BadValueError, "'gpu-7' is not a device"),
        ({"device": None}, BadValueError, "None is not a device"),
    ],
)
def test_a_cache_of_impossible_size_or_type_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    sizes = {"num_pages": 8, "page_size": 4, "num_heads": 2, "head_dim": 4, "dtype": torch.float16, "device": "cpu"}
    with pytest.raises(error, match=message) as raised:
        PagedKVCacheManager(**{**sizes, **changes})
    assert raised.type is error, "the same kind of error for every size"


@pytest.mark.parametrize("device", ["cuda:99", "cuda:100", 99])
def test_a_device_that_is_not_there_is_refused_by_its_name(device: str | int) -> None:
    with pytest.raises(BadValueError, match=f"{device!r} is not a device, or none that this torch can use"):
        PagedKVCacheManager(2, 4, 1, 1, torch.float16, device)


@pytest.mark.filterwarnings("ignore:.*quantized.*")
def test_a_dtype_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(TensorError, match=r"memory of dtype torch\.qint8 cannot be made"):
        cache(dtype=torch.qint8)


# -- append ------------------------------------------------------------------------------------------------------------


def test_the_slots_of_the_picture() -> None:
    """Ten tokens on pages 7 2 5; the last three go to slots (2, 3), (5, 0) and (5, 1), and nowhere else."""
    manager = cache()
    manager.allocate(8)
    keys, values = rows(3, 1), rows(3, 2)
    manager.append_kv(keys, values, one_sequence([7, 2, 5], 10), int32(0, 3))
    for memory, new in ((manager.key_cache, keys), (manager.value_cache, values)):
        expected = torch.zeros_like(memory)
        expected[2, 3], expected[5, 0], expected[5, 1] = new
        assert same(memory, expected)


@st.composite
def appends(draw: st.DrawFn) -> tuple[PagedKVCacheManager, list[list[int]], list[int], list[int]]:
    """A cache, and for each sequence its pages, its tokens after the append and the number appended."""
    page_size = draw(st.sampled_from([1, 2, 4]))
    manager = cache(
        num_pages=24,
        page_size=page_size,
        kv_layout=draw(st.sampled_from(["NHD", "HND"])),
        num_layers=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    numbers = draw(st.permutations(manager.allocate(24).tolist()))
    tables, lens, new = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        num_tokens = draw(st.integers(0, 3 * page_size))
        num_pages = -(-num_tokens // page_size)
        tables.append(numbers[:num_pages])
        numbers = numbers[num_pages:]
        lens.append(num_tokens)
        new.append(draw(st.integers(0, num_tokens)))
    return manager, tables, lens, new


@given(appends(), st.booleans())
def test_appended_rows_are_the_tail_of_each_sequence(
    case: tuple[PagedKVCacheManager, list[list[int]], list[int], list[int]], wide: bool
) -> None:
    manager, tables, lens, new = case
    last = [(n - 1) % manager.page_size + 1 if n else 0 for n in lens]
    indices = int32(*(page for table in tables for page in table))
    packed = FlashInferPackedData(indices, int32(*np.cumsum([0, *map(len, tables)]).tolist()), int32(*last))
    indptr = torch.tensor(np.cumsum([0, *new]), dtype=torch.int64 if wide else torch.int32)
    layer = manager.num_layers - 1
    keys, values = rows(sum(new), 1, manager.dtype), rows(sum(new), 2, manager.dtype)
    before = [tensor.clone() for tensor in manager.get_memory_tensors()]
    manager.append_kv(keys, values, packed, indptr, layer=layer)
    for memory, expected, added in zip(manager.get_memory_tensors(), before, (keys, values), strict=True):
        one_layer = expected[layer] if manager.num_layers > 1 else expected
        row = 0
        for table, num_tokens, num_new in zip(tables, lens, new, strict=True):
            for token in range(num_tokens - num_new, num_tokens):
                page, offset = table[token // manager.page_size], token % manager.page_size
                slot(manager, one_layer, page, offset).copy_(added[row])
                row += 1
        assert same(memory, expected)


def test_appending_token_by_token_is_the_same_as_all_at_once() -> None:
    whole, steps = cache(), cache()
    keys, values = rows(10, 1), rows(10, 2)
    for manager in (whole, steps):
        manager.allocate(8)
    whole.append_kv(keys, values, one_sequence([7, 2, 5], 10), int32(0, 10))
    for n in range(1, 11):
        packed = one_sequence([7, 2, 5][: -(-n // 4)], n)
        steps.append_kv(keys[n - 1 : n], values[n - 1 : n], packed, int32(0, 1))
    assert same(whole.key_cache, steps.key_cache)
    assert same(whole.value_cache, steps.value_cache)


def test_both_layouts_hold_the_same() -> None:
    nhd, hnd = cache(num_layers=2), cache(num_layers=2, kv_layout="HND")
    for manager in (nhd, hnd):
        manager.allocate(8)
        manager.append_kv(rows(6, 1), rows(6, 2), one_sequence([3, 1], 6), int32(0, 6), layer=1)
        manager.copy_page_slots([1], [4], [2])
    assert same(nhd.key_cache, hnd.key_cache.transpose(-3, -2))
    assert same(nhd.value_cache, hnd.value_cache.transpose(-3, -2))


def test_rows_may_be_strided_and_may_need_gradients() -> None:
    manager = cache()
    manager.allocate(2)
    both = torch.stack((rows(4, 1), rows(4, 2)), dim=1).requires_grad_()
    manager.append_kv(both[:, 0], both[:, 1], one_sequence([1], 4), int32(0, 4))
    assert same(manager.key_cache[1], both[:, 0])
    assert not manager.key_cache.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128], ids=str)
def test_rows_may_be_lazily_negated_or_conjugated(dtype: torch.dtype) -> None:
    manager = cache(dtype=dtype)
    manager.allocate(2)
    keys, values = torch._neg_view(rows(4, 1, dtype)), rows(4, 2, dtype)
    if dtype.is_complex:
        values = (values * (1 + 2j)).conj()
    manager.append_kv(keys, values, one_sequence([1], 4), int32(0, 4))
    assert torch.equal(manager.key_cache[1], -rows(4, 1, dtype))
    assert torch.equal(manager.value_cache[1], values)


def test_appending_nothing_to_nobody_is_legal() -> None:
    manager = cache()
    manager.append_kv(rows(0), rows(0), FlashInferPackedData(int32(), int32(0), int32()), int32(0))
    assert not manager.key_cache.any()


# -- copy --------------------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(["NHD", "HND"]), st.integers(1, 3), st.sampled_from(DTYPES))
def test_copied_slots_are_those_of_a_loop(
    data: st.DataObject, kv_layout: str, num_layers: int, dtype: torch.dtype
) -> None:
    manager = cache(dtype=dtype, kv_layout=kv_layout, num_layers=num_layers)
    numbers = data.draw(st.permutations(manager.allocate(8).tolist()))
    dst = numbers[: data.draw(st.integers(0, 4))]
    src = [data.draw(st.sampled_from(numbers[4:])) for _ in dst]
    num_slots = [data.draw(st.integers(1, 4)) for _ in dst]
    for seed, memory in enumerate(manager.get_memory_tensors()):
        memory.copy_(rows(memory.numel() // 8, seed, dtype).view(memory.shape))
    expected = [memory.clone() for memory in manager.get_memory_tensors()]
    for memory in expected:
        for layer in memory.view(num_layers, *memory.shape[-4:]):
            for a, b, n in zip(src, dst, num_slots, strict=True):
                for offset in range(n):
                    slot(manager, layer, b, offset).copy_(slot(manager, layer, a, offset))
    manager.copy_page_slots(src, dst, num_slots)
    for memory, wanted in zip(manager.get_memory_tensors(), expected, strict=True):
        assert same(memory, wanted)


def test_a_bad_copy_is_refused_and_writes_nothing() -> None:
    manager = cache()
    manager.allocate(2)
    manager.key_cache[0] = 1
    for src, dst, num_slots in (([0], [3], [1]), ([0], [1], [5]), ([0], [1], [0]), ([0], [0], [1]), ([0], [1, 1], [1])):
        with pytest.raises(BadValueError):
            manager.copy_page_slots(src, dst, num_slots)
    assert manager.key_cache.sum() == manager.key_cache[0].numel()


class TornTensor(torch.Tensor):
    """Memory that cannot be read, as when there is no room for what would be read."""

    def __getitem__(self, index: Any) -> torch.Tensor:  # noqa: ANN401  whatever tensors take
        raise MemoryError(f"no room for {index}")


def test_a_copy_that_cannot_read_the_values_has_written_no_keys() -> None:
    manager = cache(kv_layout="HND", num_layers=2)
    manager.allocate(2)
    manager.key_cache.copy_(torch.arange(manager.key_cache.numel()).view_as(manager.key_cache))
    keys, values = manager.key_cache.clone(), manager.value_cache
    manager.value_cache = values.as_subclass(TornTensor)
    with pytest.raises(MemoryError, match="no room"):
        manager.copy_page_slots([0], [1], [3])
    assert same(manager.key_cache, keys)
    manager.value_cache = values
    manager.copy_page_slots([0], [1], [3])
    assert same(manager.key_cache[:, 1, :, :3], keys[:, 0, :, :3])
