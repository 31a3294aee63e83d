"""Appending and copying on the GPU: byte for byte what the CPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from radix import PrefixCache
from seqattn.cache import PagedKVCacheManager, as_bits
from seqattn.descriptor import CacheDescriptor
from seqattn.errors import SharedPageError

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

#: dtype, head_dim, page_size, layout, layers: the kernels' and those that only torch writes
FORMS = [
    (torch.bfloat16, 128, 16, "NHD", 1),
    (torch.bfloat16, 128, 16, "HND", 3),
    (torch.float16, 64, 1, "NHD", 2),
    (torch.float16, 256, 64, "HND", 1),
    (torch.bfloat16, 80, 16, "NHD", 2),
    (torch.float8_e4m3fn, 128, 16, "NHD", 2),
    (torch.float8_e4m3fn, 33, 16, "HND", 1),
    (torch.float32, 128, 5, "NHD", 1),
]


def pair(form: tuple[torch.dtype, int, int, str, int]) -> list[PagedKVCacheManager]:
    dtype, head_dim, page_size, layout, num_layers = form
    sizes = (300, page_size, 3, head_dim, dtype)
    managers = [PagedKVCacheManager(*sizes, device, layout, num_layers=num_layers) for device in ("cuda", "cpu")]
    for cache in ("key_cache", "value_cache"):
        bits = as_bits(getattr(managers[1], cache))
        bits.random_(0, 100)
        as_bits(getattr(managers[0], cache)).copy_(bits)
    return managers


def same(managers: list[PagedKVCacheManager]) -> bool:
    a, b = (manager.get_memory_tensors() for manager in managers)
    return all(torch.equal(as_bits(x).cpu(), as_bits(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_appends_write_what_they_write_on_the_cpu(form: tuple[torch.dtype, int, int, str, int]) -> None:
    rng = np.random.default_rng(0)
    managers = pair(form)
    descriptors = [CacheDescriptor(manager) for manager in managers]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        new = [int(n) for n in rng.integers(1, 20 if form[2] > 1 else 8, 7)]
        indptr = torch.tensor(np.concatenate(([0], np.cumsum(new))), dtype=torch.int32)
        for descriptor in descriptors:
            descriptor.allocate(list(range(7)), new)
        for layer in range(managers[0].num_layers):
            keys, values = (torch.randn(sum(new), 3, form[1], generator=generator).to(form[0]) for _ in range(2))
            for descriptor, manager in zip(descriptors, managers, strict=True):
                packed = descriptor.pack_for_flashinfer(list(range(7)))
                rows = keys.to(manager.device), values.to(manager.device)
                if step % 2:  # a view of a fused projection
                    rows = torch.stack(rows, dim=1).unbind(1)  # type: ignore[assignment]
                manager.append_kv(*rows, packed, indptr, layer=layer)
        assert same(managers)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_copies_of_page_tails_are_those_of_the_cpu(form: tuple[torch.dtype, int, int, str, int]) -> None:
    rng = np.random.default_rng(1)
    managers = pair(form)
    slots = rng.integers(1, form[2] + 1, 40)
    for manager in managers:
        pages = manager.allocate(80)
        manager.copy_page_slots(pages[:40], pages[40:], slots)
    assert same(managers)


def test_a_page_that_becomes_shared_between_two_layers_is_not_written() -> None:
    manager = PagedKVCacheManager(8, 16, 2, 128, torch.bfloat16, "cuda", num_layers=2)
    descriptor = CacheDescriptor(manager)
    descriptor.allocate([0], [3])
    packed, indptr = descriptor.pack_for_flashinfer([0]), torch.tensor([0, 3])
    rows = torch.ones(3, 2, 128, device="cuda", dtype=torch.bfloat16)
    manager.append_kv(rows, rows, packed, indptr, layer=0)
    manager.ref(descriptor.seq_id_to_data[0].pages)
    with pytest.raises(SharedPageError):
        manager.append_kv(rows, rows, packed, indptr, layer=1)
    assert not manager.layer_tensors(1)[0].any()


def test_all_tails_of_forks_in_all_layers_are_copied_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty-four answers to one prompt of two pages and five tokens of a third, over 32 layers."""
    from seqattn.kernels import Launcher  # where there is Triton

    launches: list[str] = []
    launch = Launcher._launch

    def noted(self: Launcher, kernel: Any, *rest: Any) -> None:  # noqa: ANN401  as `Launcher._launch`
        launches.append(kernel.fn.__name__)
        launch(self, kernel, *rest)

    manager = PagedKVCacheManager(80, 16, 2, 128, torch.bfloat16, "cuda", num_layers=32)
    for memory in manager.get_memory_tensors():
        as_bits(memory).random_(0, 100)
    cache, prompt = PrefixCache(manager), list(range(37))
    cache.start("first", prompt)
    cache.finish("first")
    monkeypatch.setattr(Launcher, "_launch", noted)
    started = cache.start_many(range(64), [[*prompt, 1000 + i] for i in range(64)])
    assert launches == ["_copy"]
    assert len({found.forked[1] for found in started if found.forked}) == 64
    for found in started:
        assert found.forked
        source, copy, num_slots = found.forked
        assert num_slots == 5
        for layer in range(32):
            for tensor in manager.layer_tensors(layer):
                assert torch.equal(tensor[copy, :5], tensor[source, :5])
    cache.check()
