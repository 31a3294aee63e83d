"""flashinfer's kernels against float32 attention on the GPU: random forests, fresh inputs, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from seqattn.attention import PagedAttention
from seqattn.attention.calls import Choice
from seqattn.attention.plan import plan_batch
from seqattn.cache import PagedKVCacheManager
from seqattn.device import Device
from seqattn.errors import SeqAttnError, TensorError
from seqattn.packed import FlashInferHybridData, FlashInferPackedData
from tests.gpu.batches import MOST_ERROR, Case, attend, fill, hybrid, plain, random_batch, relative_error
from tests.seqattn.truth import Batch, batch_of, int32

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

HEADS = [(32, 8), (32, 32), (8, 1)]
CASES = [
    *(Case(*heads, 128, page_size, torch.bfloat16) for heads, page_size in product(HEADS, (1, 16, 64))),
    Case(32, 8, 128, 16, torch.bfloat16, "HND"),
    Case(32, 8, 128, 1, torch.float16),
    Case(32, 8, 128, 16, torch.float16),
    Case(32, 8, 64, 1, torch.bfloat16),
    Case(32, 8, 64, 16, torch.bfloat16),
    Case(32, 32, 64, 16, torch.float16),
    Case(8, 1, 64, 64, torch.float16),
    Case(8, 2, 256, 16, torch.bfloat16),
]


def poison() -> None:
    """Fills freed memory with NaN, so that an output that is not written shows."""
    blocks = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(8)]
    blocks += [torch.full((1 << n,), float("nan"), device="cuda") for n in range(8, 20)]
    del blocks


def check(
    attention: PagedAttention, batch: Batch, generator: torch.Generator, *, causal: bool = True, layer: int = 0
) -> None:
    """Runs what is planned on fresh queries."""
    manager = attention.manager
    shape = (sum(batch.query_lens), attention.num_qo_heads, manager.head_dim)
    q = torch.randn(shape, generator=generator, device="cuda").to(manager.dtype)
    expected_out, expected_lse = attend(manager, batch, q, causal=causal, layer=layer)
    poison()
    out, lse = attention.run(q, layer=layer, return_lse=True)
    assert relative_error(out, expected_out) < MOST_ERROR[manager.dtype]
    assert relative_error(lse, expected_lse) < 1e-3
    poison()
    assert torch.equal(attention.run(q, layer=layer), out)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("most_rows", [1, 9, 300])
def test_plain_and_hybrid_attention_are_dense_attention(case: Case, most_rows: int) -> None:
    for seed in range(3):
        batch = random_batch(100 * most_rows + seed, case.page_size, most_rows=most_rows)
        manager = case.manager(batch)
        generator = fill(manager, seed)
        attention = PagedAttention(manager, case.num_qo_heads)
        assert attention.backend == "flashinfer"
        attention.plan(plain(batch), query_lens=batch.query_lens)
        check(attention, batch, generator)
        attention.plan(hybrid(batch))
        check(attention, batch, generator)
        attention.plan(hybrid(batch), causal=False)
        check(attention, batch, generator, causal=False)


@pytest.mark.parametrize("slices", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
@pytest.mark.parametrize("overlap", [False, True], ids=["one stream", "three streams"])
def test_every_way_to_compute_a_level_is_right(kernel: str, slices: int, overlap: bool) -> None:
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batch = random_batch(slices, 16, most_rows=1)
    manager = case.manager(batch, num_layers=2)
    generator = fill(manager, 0)
    attention = PagedAttention(manager, 32)
    impl = attention._impl
    impl.overlap = overlap  # type: ignore[attr-defined]
    data = hybrid(batch)
    attention.plan(data)
    plan = plan_batch(manager, data, None, causal=True)
    choices = [Choice(kernel, slices)] * (len(plan.levels) - 1)  # type: ignore[arg-type]
    attention._prepared = impl.prepare(plan, [*choices, Choice("decode")])  # type: ignore[call-arg]
    for layer in range(2):
        check(attention, batch, generator, layer=layer)


def in_line(num_shared: int, page_size: int) -> tuple[Batch, list[int]]:
    """70 sequences on pages that lie side by side, and the pages behind these, which are nobody's."""
    shared, behind = list(range(3, 3 + num_shared)), list(range(3 + num_shared, 10 + num_shared))
    tables = [[*shared, behind[-1] + 1 + i] for i in range(70)]
    return batch_of(tables, [1 + i % page_size for i in range(70)], page_size, [1] * 70), behind


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize(
    "case",
    [Case(*heads, 128, 16, torch.bfloat16, layout) for heads in HEADS for layout in ("NHD", "HND")]
    + [Case(32, 8, 128, 64, torch.bfloat16), Case(32, 8, 128, 16, torch.float16)]
    + [Case(32, 8, 64, 16, torch.bfloat16), Case(8, 1, 64, 64, torch.float16)],
    ids=str,
)
def test_pages_side_by_side_are_read_and_nothing_behind_them(case: Case, slices: int) -> None:
    batch, behind = in_line(7 + 2048 // case.page_size, case.page_size)
    manager = case.manager(batch, num_layers=2)
    generator = fill(manager, 0)
    for cache in manager.get_memory_tensors():
        cache[:, behind] = float("nan")
        cache[:, :3] = float("nan")
    attention = PagedAttention(manager, case.num_qo_heads)
    plan = plan_batch(manager, hybrid(batch), None, causal=True)
    attention.plan(hybrid(batch))
    choices = [Choice("fa3", slices), Choice("decode")]
    attention._prepared = attention._impl.prepare(plan, choices)  # type: ignore[call-arg]
    is_long = 2048 // slices >= 512
    assert (attention._prepared.work.calls[0].span is not None) == (case.kv_layout == "NHD" and is_long)
    for layer in range(2):
        check(attention, batch, generator, layer=layer)


def test_plans_may_follow_one_another_while_the_device_lags() -> None:
    """Forty plans without a wait: each run must see its own pages."""
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batches = [random_batch(seed, 16, most_rows=1) for seed in range(40)]
    largest = max(batches, key=lambda batch: max(int(table.max()) for table in batch.tables))
    manager = case.manager(largest)
    fill(manager, 0)
    attention = PagedAttention(manager, 32)
    queries = [torch.randn(len(b.tables), 32, 128, device="cuda", dtype=torch.bfloat16) for b in batches]
    attention.plan(hybrid(batches[0]))
    attention.run(queries[0])  # what is compiled at first use is out of the way
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    outs = []
    for batch, q in zip(batches, queries, strict=True):
        attention.plan(hybrid(batch))
        outs.append(attention.run(q))
    for batch, q, out in zip(batches, queries, outs, strict=True):
        assert relative_error(out, attend(manager, batch, q)[0]) < 1e-2


@pytest.mark.parametrize("data", [plain, hybrid])
@pytest.mark.parametrize(
    ("heads", "num_pages"), [((32, 8), 80), ((32, 8), 3), ((8, 8), 20)], ids=["long lists", "short lists", "CUDA cores"]
)
def test_plans_of_batches_of_one_size_are_repeated(
    data: Callable[[Batch], FlashInferPackedData | FlashInferHybridData], heads: tuple[int, int], num_pages: int
) -> None:
    """Other pages and lengths with each plan; both sets of wrappers, with the log-sum-exp and without."""
    rng = np.random.default_rng(3)
    batches = []
    for _ in range(9):
        pages, shared = rng.permutation(30 * num_pages), num_pages // 2
        own = [rng.integers(1, num_pages - shared + 1) for _ in range(24)]
        tables = [[*range(shared), *(shared + pages[i * num_pages :][: own[i]])] for i in range(24)]
        batches.append(batch_of(tables, rng.integers(1, 17, 24).tolist(), 16, [1] * 24))
    largest = max(batches, key=lambda batch: max(int(table.max()) for table in batch.tables))
    manager = Case(*heads, 128, 16, torch.bfloat16).manager(largest)
    generator = fill(manager, 0)
    attention = PagedAttention(manager, heads[0])
    for batch in batches:
        attention.plan(data(batch))
        check(attention, batch, generator)
    impl: Any = attention._impl
    wrappers = [each for found in impl.sets for kind in found._by_kind.values() for each in kind]
    decoding = [wrapper for wrapper in wrappers if wrapper.replans is not None]
    assert len(decoding) >= 2
    assert all(wrapper.replans.is_repeated for wrapper in decoding), "or flashinfer keeps its arrays elsewhere"


def _fails(*_: object, **_options: object) -> None:
    raise RuntimeError("out of memory, say")


def test_a_plan_that_fails_leaves_the_plan_before(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batch, other = random_batch(5, 16, most_rows=1), random_batch(6, 16, most_rows=1)
    manager = case.manager(max(batch, other, key=lambda each: max(int(table.max()) for table in each.tables)))
    generator = fill(manager, 0)
    attention = PagedAttention(manager, 32)
    attention.plan(hybrid(batch))
    with pytest.raises(TensorError):
        attention.plan([[0, 1]])  # type: ignore[arg-type]
    check(attention, batch, generator)
    impl: Any = attention._impl
    plan_call = impl.plan_call
    for before_it in ([], [plan_call]):  # at a shared level, and behind it
        calls = iter([*before_it, _fails])
        monkeypatch.setattr(impl, "plan_call", lambda *a, calls=calls, **options: next(calls)(*a, **options))
        with pytest.raises(RuntimeError, match="out of memory"):
            attention.plan(hybrid(other))
        monkeypatch.undo()
        check(attention, batch, generator)
    attention.plan(hybrid(other))
    check(attention, other, generator)


def test_plans_are_made_inside_of_inference_mode_and_outside() -> None:
    """What a plan makes inside could not be written to outside of it."""
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batches = [random_batch(seed, 16, most_rows=1) for seed in range(4)]
    manager = case.manager(max(batches, key=lambda batch: max(int(table.max()) for table in batch.tables)))
    generator = fill(manager, 0)
    attention = PagedAttention(manager, 32)
    for number, batch in enumerate([*batches, *batches]):
        for data in (hybrid(batch), plain(batch)):
            with torch.inference_mode(mode=number % 3 == 0):
                attention.plan(data)
            with torch.inference_mode(mode=number % 2 == 0):
                check(attention, batch, generator)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second device")
def test_a_cache_on_the_second_device_is_read_there() -> None:
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batch = random_batch(3, 16, most_rows=1)
    num_pages = 1 + max(int(table.max()) for table in batch.tables)
    manager = PagedKVCacheManager(num_pages, 16, 8, 128, torch.bfloat16, "cuda:1")
    for cache in manager.get_memory_tensors():
        cache.normal_()
    attention = PagedAttention(manager, 32)
    q = torch.randn(len(batch.tables), 32, 128, device="cuda:1", dtype=case.dtype)
    for data in (hybrid(batch), plain(batch)):
        attention.plan(data)
        assert relative_error(attention.run(q), attend(manager, batch, q)[0]) < 1e-2
    assert torch.cuda.current_device() == 0


def test_rows_that_see_nothing_and_sequences_without_rows() -> None:
    manager = PagedKVCacheManager(8, 16, 8, 128, torch.bfloat16, "cuda")
    fill(manager, 0)
    attention = PagedAttention(manager, 32)
    packed = FlashInferPackedData(int32(3, 4), int32(0, 1, 1, 2), int32(16, 0, 7))
    attention.plan(packed, query_lens=[0, 2, 1], causal=False)
    q = torch.randn(3, 32, 128, device="cuda", dtype=torch.bfloat16)
    poison()
    out, lse = attention.run(q, return_lse=True)
    assert not out[:2].any()
    assert (lse[:2] == -torch.inf).all()
    assert torch.isfinite(out[2]).all()
    assert torch.isfinite(lse[2]).all()
    attention.plan(FlashInferPackedData(int32(), int32(0), int32()))
    assert list(attention.run(q[:0]).shape) == [0, 32, 128]


def test_queries_of_another_dtype_and_plans_in_a_capture_are_refused() -> None:
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batch = random_batch(5, 16, most_rows=1)
    attention = PagedAttention(case.manager(batch), 32)
    attention.plan(hybrid(batch))
    with pytest.raises(TensorError, match="but the cache holds"):
        attention.run(torch.zeros(len(batch.tables), 32, 128, device="cuda", dtype=torch.float16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(SeqAttnError, match="plan cannot be captured"):
        attention.plan(hybrid(batch))


@pytest.mark.parametrize("data", [plain, hybrid])
def test_a_soft_cap_holds_in_every_level(data: Callable[[Batch], FlashInferPackedData | FlashInferHybridData]) -> None:
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batch = random_batch(7, 16, most_rows=1)
    manager = case.manager(batch)
    fill(manager, 0)
    q = 4 * torch.randn(len(batch.tables), 32, 128, device="cuda", dtype=torch.bfloat16)
    attention = PagedAttention(manager, 32, logits_soft_cap=5.0)
    attention._impl.costs = Device(132, has_fa3=False)  # a kernel less to compile
    reference = PagedAttention(manager, 32, logits_soft_cap=5.0, backend="torch")
    found = []
    for each in (attention, reference):
        each.plan(data(batch))
        found.append(each.run(q.to(each.manager.dtype), return_lse=True))
    assert relative_error(found[0][0], found[1][0].float()) < 1e-2
    assert relative_error(found[0][1], found[1][1]) < 1e-3


@pytest.mark.parametrize("batch", [random_batch(7, 16, most_rows=1), in_line(135, 16)[0]], ids=["lists", "an array"])
def test_a_soft_cap_holds_in_fa3(batch: Batch) -> None:
    manager = Case(32, 8, 128, 16, torch.bfloat16).manager(batch)
    fill(manager, 0)
    q = 4 * torch.randn(len(batch.tables), 32, 128, device="cuda", dtype=torch.bfloat16)
    attention = PagedAttention(manager, 32, logits_soft_cap=5.0)
    attention._impl.costs = Device(132, has_fa3=False)  # until it is told otherwise: a kernel less to compile
    reference = PagedAttention(manager, 32, logits_soft_cap=5.0, backend="torch")
    data = hybrid(batch)
    for each in (attention, reference):
        each.plan(data)
    plan = plan_batch(manager, data, None, causal=True)
    choices = [*[Choice("fa3", 2)] * (len(plan.levels) - 1), Choice("decode")]
    attention._prepared = attention._impl.prepare(plan, choices)  # type: ignore[call-arg]
    out, lse = attention.run(q, return_lse=True)
    expected, expected_lse = reference.run(q.float(), return_lse=True)
    assert relative_error(out, expected) < 1e-2
    assert relative_error(lse, expected_lse) < 1e-3
    capless = PagedAttention(manager, 32, backend="torch")
    capless.plan(data)
    assert relative_error(out, capless.run(q.float())) > 0.1, "the cap matters"


def test_a_float8_cache_is_read_by_the_torch_backend() -> None:
    case = Case(8, 2, 128, 16, torch.float8_e4m3fn)
    batch = random_batch(8, 16, most_rows=1, most_tokens=300)
    manager = case.manager(batch)
    for cache in manager.get_memory_tensors():
        cache.copy_(torch.randn(cache.shape, device="cuda"))
    attention = PagedAttention(manager, 8)
    assert attention.backend == "torch"
    q = torch.randn(len(batch.tables), 8, 128, device="cuda", dtype=torch.bfloat16)
    for data in (plain(batch), hybrid(batch)):
        attention.plan(data)
        assert relative_error(attention.run(q), attend(manager, batch, q)[0]) < 1e-2


def test_a_cache_that_the_kernels_do_not_read_gets_the_torch_backend() -> None:
    for dtype, head_dim in ((torch.float32, 128), (torch.bfloat16, 80), (torch.float8_e4m3fn, 128)):
        manager = PagedKVCacheManager(4, 16, 2, head_dim, dtype, "cuda")
        assert PagedAttention(manager, 2).backend == "torch"
        with pytest.raises(TensorError, match="use backend='torch'"):
            PagedAttention(manager, 2, backend="flashinfer")


def test_run_can_be_captured_in_a_graph_which_is_let_go_when_its_plan_is_void() -> None:
    case = Case(32, 8, 128, 16, torch.bfloat16)
    batch = random_batch(6, 16, most_rows=1)
    manager = case.manager(batch)
    fill(manager, 0)
    attention = PagedAttention(manager, 32)
    attention.plan(hybrid(batch))
    q = torch.randn(len(batch.tables), 32, 128, device="cuda", dtype=torch.bfloat16)
    attention.run(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.run(q)
    for _ in range(3):
        q.normal_()
        graph.replay()
        assert relative_error(out, attend(manager, batch, q)[0]) < 1e-2
    impl: Any = attention._impl
    captured = attention._prepared
    attention.plan(plain(batch))
    assert any(captured in kept for kept in impl._captured)
    attention.plan(plain(batch))
    assert not any(impl._captured)
