"""Public methods are atomic: threads that share a cache cannot get it out of order."""

from __future__ import annotations

import os

import pytest

from tests.radix.threads import run_threads

#: on each of the two caches
SECONDS = 30.0 if os.environ.get("SEQATTN_LONG") == "1" else 2.5


@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 90), (16, 60)])
def test_eight_threads_leave_the_cache_sound_and_every_page_accounted_for(page_size: int, num_pages: int) -> None:
    assert run_threads(page_size, num_pages, SECONDS) > 1000
