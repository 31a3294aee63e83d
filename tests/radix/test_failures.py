"""A failure at any allocation or any copy leaves everything as it was, and the same call then succeeds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from radix.cache import PrefixCache
from seqattn.errors import NoPageError
from tests.radix.driver import assert_lives
from tests.radix.fake_kv import FakeKV, Remembered
from tests.radix.state import snapshot
from tests.radix.world import World

if TYPE_CHECKING:
    from seqattn.pages import PageArray, PageList

Result = TypeVar("Result")


class InjectedError(RuntimeError):
    """What the memory raises when it is told to."""


class FlakyKV(FakeKV):
    """Fails at the `fuse`-th allocation or copy from now; at a copy before anything is written."""

    fuse: int | None = None

    def take_into(self, pages: PageArray) -> None:
        self.burn()
        super().take_into(pages)

    def copy_page_slots(self, src_pages: PageList, dst_pages: PageList, num_slots: PageList) -> None:
        self.burn()
        super().copy_page_slots(src_pages, dst_pages, num_slots)

    def burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse == 0:
                raise InjectedError

    def contents(self) -> dict[int, list[Remembered | None]]:
        """What the slots of the pages in use remember."""
        return {page: list(self.slots[page]) for page in self.ref_count.nonzero()[0].tolist()}


class StubbornCache(PrefixCache):
    """Makes each call fail at its first allocation or copy, then at its second, and so on until it gets through."""

    manager: FlakyKV
    num_injected = 0

    def insist(self, call: Callable[[], Result]) -> Result:
        for fuse in count(1):
            before, contents = snapshot(self), self.manager.contents()
            self.manager.fuse = fuse
            try:
                return call()
            except InjectedError:
                self.manager.fuse = None
                assert snapshot(self) == before, f"a failure at allocation or copy {fuse} left a trace"
                assert self.manager.contents() == contents, f"a failure at allocation or copy {fuse} wrote memory"
                self.check_without_books()
                type(self).num_injected += 1
            finally:
                self.manager.fuse = None
        raise AssertionError("count() ended")

    def check_without_books(self) -> None:
        """`check`, where pages may be held by hand."""
        self.tree.check()
        self.descriptor.check()

    def start(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  passed on as they come
        return self.insist(lambda: super(StubbornCache, self).start(*args, **kwargs))

    def start_many(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return self.insist(lambda: super(StubbornCache, self).start_many(*args, **kwargs))

    def extend(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self.insist(lambda: super(StubbornCache, self).extend(*args, **kwargs))

    def fork(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self.insist(lambda: super(StubbornCache, self).fork(*args, **kwargs))


def flaky_world(num_pages: int, page_size: int, *, whole_pages: bool = False) -> World:
    memory = FlakyKV(num_pages, page_size)
    return World(num_pages, page_size, whole_pages=whole_pages, cache_class=StubbornCache, memory=memory)


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_lives_survive_a_failure_at_every_allocation_and_copy(first: int) -> None:
    before = StubbornCache.num_injected
    assert_lives(first, 10, 130, flaky_world)
    assert StubbornCache.num_injected - before > 100


LIVES = {
    "a start with a tail": "start 0 [1,2,3] · finish 0 · start 1 [1,2,3,4]",
    "a start that evicts": "start 0 [1,2,3] · finish 0 · start 1 [1,2,3,9] · finish 1 · start 2 [1,2,5,5,5,5]",
    "a copy to an evicted page": "start 0 [1,2,3,4] · finish 0 · start 1 [7] · finish 1 · take 0 1 · start 1 [1,2,3]",
    "tails of one call": "start 0 [1] · finish 0 · start 1 [2] · finish 1 · start_many 2 [1] 3 [2] uncached 0",
    "a fork": "start 0 [1,2,3] · fork 0 1",
    "a fork that evicts": "start 0 [1,1,2,2] · finish 0 · start 1 [3,3,3] · fork 1 2",
    "growth of a cut page": "start 0 [1,2] · publish 0 · truncate 0 1 · extend 0 [5]",
    "growth that evicts": "start 0 [1,1,2,2] · finish 0 · start 1 [3,3,3] · extend 1 [3,4]",
}


@pytest.mark.parametrize("name", list(LIVES))
def test_a_failure_in_the_middle_leaves_no_trace(name: str) -> None:
    before = StubbornCache.num_injected
    flaky_world(4, 2).live(LIVES[name]).end()
    assert StubbornCache.num_injected > before


def test_a_start_that_fails_for_want_of_pages_can_be_made_again() -> None:
    world = World(2, 2).live("start 0 [1,1,2]")
    with pytest.raises(NoPageError):
        world.cache.start(1, [3])
    world.live("finish 0 · start 1 [3] · finish 1").end()
