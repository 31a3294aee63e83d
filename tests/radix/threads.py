"""Eight threads that live on one `PrefixCache`, each with sequences of its own."""

from __future__ import annotations

import random
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress

from radix.cache import PrefixCache
from radix.running import PrefixMatch
from seqattn.errors import InvariantError, NoPageError
from tests.radix.fake_kv import FakeKV
from tests.radix.state import tables

NUM_THREADS = 8
PROMPTS = 12


class Chatter:
    """One thread's sequences: what each has been given, and how much of it is computed."""

    def __init__(self, number: int, cache: PrefixCache, memory: FakeKV, seed: int) -> None:
        self.number = number
        self.cache = cache
        self.memory = memory
        self.rng = random.Random(f"{seed} {number}")
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.pins: list[AbstractContextManager[PrefixMatch]] = []
        self.num_calls = 0

    def prompt(self) -> list[int]:
        """The beginning of one of a few texts that all threads know, and a token more."""
        rng = self.rng
        text = random.Random(rng.randrange(PROMPTS)).choices(range(3), k=6 * self.memory.page_size)
        return [*text[: rng.randint(1, len(text))], rng.randint(0, 2)]

    def compute(self, seq_id: tuple[int, int], start: int) -> None:
        """Writes the KV of the tokens from `start` on, and looks at all of it."""
        tokens, pages = self.tokens[seq_id], self.cache.descriptor.seq_id_to_data[seq_id].kv_page_indices
        self.memory.compute(pages, None, tokens, start, len(tokens))
        self.memory.assert_right(pages, None, tokens, len(tokens))

    def step(self) -> None:
        """One call, drawn."""
        self.num_calls += 1
        names = ["start", "start_many", "look", "evict"] if len(self.tokens) < 3 else ["look"]
        names += ["extend", "publish", "finish", "abort", "fork", "truncate", "pack"] if self.tokens else []
        with suppress(NoPageError):
            getattr(self, self.rng.choice(names))()

    def some(self) -> tuple[int, int]:
        return self.rng.choice(list(self.tokens))

    def start(self) -> None:
        seq_id, prompt = (self.number, self.num_calls), self.prompt()
        started = self.cache.start(seq_id, prompt)
        self.tokens[seq_id] = prompt
        self.compute(seq_id, started.num_cached_tokens)

    def start_many(self) -> None:
        seq_ids = [(self.number, -2 * self.num_calls), (self.number, -2 * self.num_calls - 1)]
        prompts = [self.prompt(), self.prompt()]
        many = self.cache.start_many(seq_ids, prompts)
        for seq_id, prompt, started in zip(seq_ids, prompts, many, strict=True):
            self.tokens[seq_id] = prompt
            self.compute(seq_id, started.num_cached_tokens)

    def extend(self) -> None:
        seq_id, token = self.some(), self.rng.randint(0, 2)
        self.cache.extend([seq_id], [token])
        self.tokens[seq_id].append(token)
        self.compute(seq_id, len(self.tokens[seq_id]) - 1)

    def publish(self) -> None:
        self.cache.publish(self.some())

    def finish(self) -> None:
        seq_id = self.some()
        self.cache.finish(seq_id)
        del self.tokens[seq_id]

    def abort(self) -> None:
        seq_id = self.some()
        self.cache.abort(seq_id)
        del self.tokens[seq_id]

    def fork(self) -> None:
        seq_id, child = self.some(), (self.number, self.num_calls)
        self.cache.fork(seq_id, child)
        self.tokens[child] = list(self.tokens[seq_id])
        self.compute(child, len(self.tokens[child]))

    def truncate(self) -> None:
        seq_id = self.some()
        length = self.rng.randint(1, len(self.tokens[seq_id]))
        self.cache.truncate(seq_id, length)
        del self.tokens[seq_id][length:]

    def look(self) -> None:
        """Reads and pins."""
        prompt, rng = self.prompt(), self.rng
        assert self.cache.match(prompt).num_tokens <= len(prompt)
        self.cache.can_start(prompt)
        assert 0 <= self.cache.num_reclaimable_pages <= self.cache.manager.num_pages
        assert self.cache.show().startswith(("namespace None", "(empty)"))
        if rng.random() < 0.5 and len(self.pins) < 2:
            self.pins.append(self.cache.pin(prompt))
            self.pins[-1].__enter__()
        elif self.pins:
            self.pins.pop(rng.randrange(len(self.pins))).__exit__(None, None, None)

    def pack(self) -> None:
        """Both forms of a batch have its lengths, which no other thread changes."""
        seq_ids = self.rng.sample(list(self.tokens), k=self.rng.randint(0, len(self.tokens)))
        num_tokens = [len(self.tokens[seq_id]) for seq_id in seq_ids]
        plain = self.cache.pack_for_flashinfer(seq_ids)
        assert plain.num_tokens(self.memory.page_size).tolist() == num_tokens
        hybrid = self.cache.pack_hybrid_for_flashinfer(seq_ids, num_tokens=num_tokens)
        assert sorted(hybrid.order.tolist()) == list(range(len(seq_ids)))

    def evict(self) -> None:
        self.cache.evict(self.rng.randint(0, 2))
        if self.rng.random() < 0.02:
            self.cache.clear()

    def end(self) -> None:
        """Lets go of everything."""
        while self.pins:
            self.pins.pop().__exit__(None, None, None)
        while self.tokens:
            self.abort()


def run_threads(page_size: int, num_pages: int, seconds: float, seed: int = 0) -> int:
    """Eight threads make random calls for some time, while this one checks; returns how many calls they made.

    Raises:
        InvariantError, AssertionError: what a thread or a check found, or pages are lost in the end.
    """
    memory = FakeKV(num_pages, page_size)
    cache = PrefixCache(memory)
    chatters = [Chatter(number, cache, memory, seed) for number in range(NUM_THREADS)]
    errors: list[BaseException] = []
    until = time.monotonic() + seconds

    def live(chatter: Chatter) -> None:
        try:
            while time.monotonic() < until and not errors:
                chatter.step()
            chatter.end()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=live, args=(chatter,)) for chatter in chatters]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads change places inside of calls, not only between them
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
            cache.check()
    except InvariantError as error:
        errors.append(error)  # behind what a thread may have found before
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    assert_accounted(cache)
    return sum(chatter.num_calls for chatter in chatters)


def assert_accounted(cache: PrefixCache) -> None:
    """Nothing runs, so evicting everything must free every page."""
    cache.check()
    assert tables(cache) == {}
    cache.evict(cache.manager.num_pages)
    cache.check()
    assert cache.manager.available_pages_count == cache.manager.num_pages
