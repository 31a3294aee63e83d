"""Random lives of a `World`: drawn from a seed, replayed, and shrunk to the shortest that still fails."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from tests.radix.lives import Call, Tokens, described
from tests.radix.world import World

Make = Callable[[], World]

#: (page size, pages, token ids): pools so small that pages are always short, alphabets so small that prefixes collide
POOLS = [
    *((1, pages, ids) for pages, ids in ((3, 2), (6, 2), (10, 3))),
    *((2, pages, ids) for pages, ids in ((2, 2), (4, 2), (6, 2), (9, 3))),
    *((4, pages, ids) for pages, ids in ((5, 2), (8, 3))),
    *((16, pages, ids) for pages, ids in ((2, 2), (4, 2), (7, 3))),
]

_WEIGHTS = {
    "start": 20,
    "start_many": 8,
    "extend": 14,
    "compute": 6,
    "publish": 10,
    "finish": 14,
    "abort": 4,
    "fork": 7,
    "truncate": 8,
    "pin": 5,
    "unpin": 4,
    "hold": 2,
    "take": 1,
    "let_go": 3,
    "evict": 3,
    "demote": 3,
    "match": 2,
    "clear": 0.3,
}


class Drawer:
    """Draws the next call for a world."""

    def __init__(self, rng: random.Random, world: World, num_ids: int) -> None:
        self.rng = rng
        self.world = world
        self.ids = range(num_ids)
        self.known: list[Tokens] = [()]

    def call(self) -> Call:
        """One call, which may not apply."""
        name = self.rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        return (name, *getattr(self, f"_{name}")())

    def tokens(self, least: int = 1) -> Tokens:
        """Often a known prefix, cut anywhere, with some tokens more; seldom longer than the whole cache."""
        rng, model = self.rng, self.world.model
        most = model.page_size * model.num_pages + (rng.random() < 0.05)
        base = rng.choice(self.known)
        base = base[: rng.choice([len(base), len(base), rng.randint(0, len(base)), self._aligned(len(base))])]
        run = rng.choice([1, 2, model.page_size, model.page_size + 1, most // 2])
        more = tuple(rng.choices(self.ids, k=rng.randint(0, max(1, run))))
        tokens = (base + more)[:most]
        tokens += tuple(rng.choices(self.ids, k=max(0, least - len(tokens))))
        self.known = [*self.known[-9:], tokens]
        return tokens

    def _aligned(self, length: int) -> int:
        return length - length % self.world.model.page_size

    def _namespace(self) -> Hashable:
        return self.rng.choices([None, "b"], [4, 1])[0]

    def _running(self) -> int:
        running = list(self.world.model.running)
        return self.rng.choice(running) if running else 0

    def _new_id(self) -> int:
        unused = set(range(6)) - set(self.world.model.running)
        return self.rng.choice(sorted(unused)) if unused else 0

    def _length(self, seq_id: int) -> int:
        sequence = self.world.model.running.get(seq_id)
        length = len(sequence.tokens) if sequence else 0
        return self.rng.choice([self.rng.randint(0, length), self._aligned(length), length])

    def _min_uncached(self) -> int:
        return self.rng.choices([1, 0, 2, 5], [8, 4, 1, 1])[0]

    def _start(self) -> Call:
        return self._new_id(), self.tokens(), self._namespace(), self._min_uncached()

    def _start_many(self) -> Call:
        unused = sorted(set(range(6)) - set(self.world.model.running))
        seq_ids = self.rng.sample(unused, min(len(unused), self.rng.randint(0, 3)))
        return tuple((seq_id, self.tokens(), self._namespace()) for seq_id in seq_ids), self._min_uncached()

    def _extend(self) -> Call:
        running = list(self.world.model.running)
        seq_ids = self.rng.sample(running, min(len(running), self.rng.randint(0, 3)))
        return (tuple((seq_id, self._chunk(seq_id)) for seq_id in seq_ids),)

    def _chunk(self, seq_id: int) -> Tokens:
        """One token or several; often those that follow in a prompt that is known."""
        rng, has = self.rng, tuple(self.world.model.running[seq_id].tokens)
        if rng.random() < 0.5:
            return (rng.choice(self.ids),)
        longer = [tokens[len(has) :] for tokens in self.known if len(tokens) > len(has) and tokens[: len(has)] == has]
        if longer:
            return rng.choice(longer)
        chunk = tuple(rng.choices(self.ids, k=rng.randint(1, self.world.model.page_size + 1)))
        self.known = [*self.known[-9:], has + chunk]
        return chunk

    def _compute(self) -> Call:
        return (self._running(),)

    def _publish(self) -> Call:
        seq_id = self._running()
        return seq_id, self.rng.choice([None, None, self._length(seq_id)])

    _finish = _publish

    def _abort(self) -> Call:
        return (self._running(),)

    def _fork(self) -> Call:
        return self._running(), self._new_id()

    def _truncate(self) -> Call:
        seq_id = self._running()
        return seq_id, self._length(seq_id)

    def _pin(self) -> Call:
        return self.rng.randint(0, 2), self.tokens(), self._namespace()

    _hold = _pin

    def _unpin(self) -> Call:
        return (self.rng.randint(0, 2),)

    _let_go = _unpin

    def _take(self) -> Call:
        return self.rng.randint(0, 2), self.rng.randint(0, 2)

    def _evict(self) -> Call:
        return (self.rng.randint(0, 3),)

    def _demote(self) -> Call:
        """Mostly something cached, to its end or beyond."""
        rng, cached = self.rng, list(self.world.model.entries)
        namespace, tokens = rng.choice(cached) if cached and rng.random() < 0.8 else (self._namespace(), self.tokens())
        after = rng.choice([0, rng.randint(0, len(tokens)), self._aligned(rng.randint(0, len(tokens)))])
        return after, tokens + rng.choice([(), (rng.choice(self.ids),)]), namespace

    def _match(self) -> Call:
        return self.tokens(least=0), self._namespace()

    def _clear(self) -> Call:
        return ()


@dataclass
class LifeError(Exception):
    """A life that fails: how to make its world, the calls, and why."""

    where: str
    make: Make
    calls: list[Call]
    error: BaseException

    def __str__(self) -> str:
        return f"{self.where}: {' · '.join(map(described, self.calls))}: {type(self.error).__name__}: {self.error}"

    def shrunk(self) -> LifeError:
        """The shortest life found that fails too, perhaps for another reason."""
        calls = shrink(self.make, self.calls)
        return LifeError(self.where, self.make, calls, replay(self.make, calls) or self.error)


def replay(make: Make, calls: list[Call]) -> BaseException | None:
    """Makes these calls, those that apply, on a new world; returns what went wrong."""
    world = make()
    try:
        for call in calls:
            world.do(call)
        world.end()
    except Exception as error:
        return error
    return None


def random_life(seed: int, num_steps: int, make: Callable[..., World] = World) -> Counter[str]:
    """A seeded life; returns how often each call was made.

    Raises:
        LifeError: the cache and its model differ, or the cache raised what it must not.
    """
    rng = random.Random(seed)
    page_size, num_pages, num_ids = rng.choice(POOLS)
    whole_pages = rng.random() < 0.15

    def make_world() -> World:
        return make(num_pages, page_size, whole_pages=whole_pages)

    world, calls, made = make_world(), list[Call](), Counter[str]()
    drawer = Drawer(rng, world, num_ids)
    try:
        for _ in range(num_steps):
            calls.append(drawer.call())
            made[calls[-1][0]] += world.do(calls[-1])
        world.end()
    except Exception as error:
        where = f"page size {page_size}, {num_pages} pages{', whole_pages' * whole_pages}, seed {seed}"
        raise LifeError(where, make_world, calls, error) from error
    made["short"] = world.num_short
    made["evicted"] = world.model.num_evicted
    return made


def assert_lives(first_seed: int, num_lives: int, num_steps: int, make: Callable[..., World] = World) -> Counter[str]:
    """Lives from consecutive seeds; the first that fails is raised shrunk."""
    try:
        return sum((random_life(first_seed + index, num_steps, make) for index in range(num_lives)), Counter())
    except LifeError as found:
        shortest = found.shrunk()
        raise shortest from shortest.error


def shrink(make: Make, calls: list[Call], budget: int = 3000) -> list[Call]:
    """A shorter life that fails too: calls are left out, in ever smaller runs, then tokens."""

    def fails(shorter: list[Call]) -> bool:
        nonlocal budget
        budget -= 1
        return budget >= 0 and replay(make, shorter) is not None

    size = len(calls) // 2
    while size:
        at = 0
        while at < len(calls):
            shorter = calls[:at] + calls[at + size :]
            calls, at = (shorter, at) if fails(shorter) else (calls, at + size)
        size //= 2
    for index in range(len(calls)):
        for call in simpler(calls[index]):
            shorter = [*calls[:index], call, *calls[index + 1 :]]
            if fails(shorter):
                return shrink(make, shorter, budget)
    return calls


def simpler(call: Call) -> list[Call]:
    """The call with a token or an item less."""
    found = []
    for at, part in enumerate(call):
        if isinstance(part, tuple) and len(part) > (call[0] != "match"):
            found += [(*call[:at], part[:i] + part[i + 1 :], *call[at + 1 :]) for i in reversed(range(len(part)))]
        if part == "b":
            found.append((*call[:at], None, *call[at + 1 :]))
    return found
