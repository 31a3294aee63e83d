"""The allocator against a model that keeps a list of the holders of every page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seqattn.errors import NoPageError, PageError
from seqattn.page_lists import concatenate
from seqattn.pages import PageAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """Random calls; the model is a list with an entry for every reference there is, by hand or by an owner."""

    @initialize(num_pages=st.integers(1, 6))
    def begin(self, num_pages: int) -> None:
        self.pool = PageAllocator(num_pages, 4)
        self.by_hand: list[int] = []
        self.owned: list[np.ndarray[Any, np.dtype[np.int32]]] = []

    def count(self, page: int) -> int:
        return [*self.by_hand, *(held for pages in self.owned for held in pages.tolist())].count(page)

    def num_free(self) -> int:
        return sum(self.count(page) == 0 for page in range(self.pool.num_pages))

    @rule(n=st.integers(0, 7))
    def allocate(self, n: int) -> None:
        if n > self.num_free():
            with pytest.raises(NoPageError):
                self.pool.allocate(n)
            return
        pages = self.pool.allocate(n).tolist()
        assert len(set(pages)) == n
        assert not any(self.count(page) for page in pages)
        self.by_hand += pages

    @rule(pages=st.lists(st.integers(-1, 7), max_size=4))
    def ref(self, pages: list[int]) -> None:
        if any(self.count(page) == 0 for page in pages):
            with pytest.raises(PageError):
                self.pool.ref(pages)
            return
        self.pool.ref(pages)
        self.by_hand += pages

    @rule(pages=st.lists(st.integers(-1, 7), max_size=4), release=st.booleans())
    def unref(self, pages: list[int], release: bool) -> None:
        call = self.pool.release_pages if release else self.pool.unref
        if any(self.count(page) < pages.count(page) for page in pages):
            with pytest.raises(PageError):
                call(pages)
        elif all(self.by_hand.count(page) >= pages.count(page) for page in pages):
            call(pages)
            for page in pages:
                self.by_hand.remove(page)

    @rule(n=st.integers(0, 4))
    def take(self, n: int) -> None:
        if n > self.num_free():
            with pytest.raises(NoPageError):
                self.pool.take(n)
            return
        pages = self.pool.take(n)
        assert not any(self.count(page) for page in pages.tolist())
        self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.owned))[: data.draw(st.integers(0, 4))]
        self.pool.hold(pages)
        self.owned.append(pages.copy())

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        pages = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        before = self.pool.available_pages_count
        freed = self.pool.drop(pages)
        assert freed == self.num_free() - before

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release_refs(self, data: st.DataObject) -> None:
        pages = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        assert self.pool.release_refs(pages) == len(pages)

    @invariant()
    def the_allocator_is_the_model(self) -> None:
        pool = self.pool
        assert pool.ref_count.tolist() == [self.count(page) for page in range(pool.num_pages)]
        assert sorted(pool.free_pages.tolist()) == [p for p in range(pool.num_pages) if not self.count(p)]
        assert pool.available_pages_count == self.num_free()
        assert pool.num_outside_refs == len(self.by_hand)
        holders = concatenate([np.array(self.by_hand, dtype=np.int32), *self.owned])
        pool.check(holders, exact=True)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.unref(self.by_hand)
        for pages in self.owned:
            self.pool.drop(pages)
        assert self.pool.available_pages_count == self.pool.num_pages
        self.pool.check(np.empty(0, dtype=np.int32), exact=True)


TestAllocatorMachine = AllocatorMachine.TestCase
