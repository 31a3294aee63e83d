"""The ways to compute a step of shared levels, and how long each takes: with Python's numbers.

`seqattn.steps` has the formulas, which count many steps at once with numpy. The few ways of one step are counted one by
one, many times faster; and only those that could be the fastest are computed to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from seqattn.load import FA3, FA3_IN_LINE, is_long, slices_for
from seqattn.one_load import Lists, fa3_load, makes_sense, one_fa2_load
from seqattn.steps import NUMBERS, body_of, one_by_one, step_us

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from seqattn.device import Device
    from seqattn.load import Groups, Heads

    Body = tuple[float, ...]

__all__ = ["Step", "Way", "Ways", "best_slices"]


class Step(NamedTuple):
    """The calls that a step may consist of, each as `body_of` has it.

    Attributes:
        shared: for each shared level, coarsest first, the ways to compute it.
        last: the call of the last level.
    """

    shared: Sequence[list[Body]]
    last: Body


class Way(NamedTuple):
    """One way to compute a step: no step is shorter than `at_least`; then its calls as `body_of` has them.

    Attributes:
        at_least: microseconds.
        top, lower, last: the calls of the first shared level, of the second or none, and of the last.
    """

    at_least: float
    top: Body
    lower: Body | None
    last: Body


class Ways:
    """Calls and steps of a model on a device.

    Args:
        device: the device.
        heads: the model's.
    """

    def __init__(self, device: Device, heads: Heads) -> None:
        self.device, self.heads = device, heads
        self.slices: list[int] = slices_for(heads, device.slices).tolist()
        self._paces: dict[float, float] = {}

    def fa2(self, rows: int, lists: Lists, different: int) -> Body:
        """A call by fa2, or decode; the arguments are those of `one_fa2_load`."""
        given = (self.heads, self.device.num_processors, rows, lists, different)
        kernel, load = one_fa2_load(*given, has_short=self.device.has_short)
        return self._body(kernel, load)

    def shared(self, rows: int, lists: Lists, different: int, *, in_line: bool = False) -> tuple[list[int], list[Body]]:
        """The calls for a shared level of lists that are all alike, and the slices of each: 0 for fa2."""
        tokens = lists.longest
        slices = [n for n in self.slices if makes_sense(tokens, n)]
        bodies = [self.fa2(rows, lists, different)]
        for n in slices:
            kernel = FA3_IN_LINE if in_line and is_long(-(-tokens // n)) else FA3
            bodies.append(self._body(kernel, fa3_load(self.heads, rows, tokens, different, n, times=lists.num_lists)))
        return [0, *slices], bodies

    def _body(self, kernel: int, load: tuple[float, ...]) -> Body:
        is_fa3 = kernel in (FA3, FA3_IN_LINE)
        return body_of(self.device, self.device.columns[kernel], is_fa3, load, self.heads, NUMBERS)

    def plain_us(self, last: Body) -> float:
        """Microseconds of a step without shared levels."""
        return self.device.plain_us + last[0] + last[1]

    def idle_us(self, call: Body) -> float:
        """Microseconds that a call takes because some of its blocks are longer than others."""
        return call[0] - call[11]

    def step_us(self, way: Way) -> float:
        """Microseconds of a step."""
        return float(step_us(self.device, way.top, way.lower, way.last, NUMBERS))

    def all(self, step: Step) -> Iterable[Way]:
        """All ways to compute the shared levels of a step, those of the first level for each of the second.

        Levels behind the second are computed in the way that is fastest alone, behind the second.
        """
        top, *lower = step.shared
        if not lower:
            return self._single(top, step.last)
        second, *behind = lower
        for bodies in behind:
            then = bodies[_fastest_alone(bodies)]
            second = [one_by_one(body, then, self.device.level_us) for body in second]
        return self._pairs(top, second, step.last)

    def least(self, step: Step) -> tuple[float, list[int]]:
        """The least time of a step, in microseconds, and which way to compute each of its shared levels that is.

        Cost: less than a microsecond for each two ways, and three for each two that could be the fastest: mostly these
        are the first.
        """
        if not step.shared:
            return self.plain_us(step.last), []
        best, best_us = 0, float("inf")
        for i, way in sorted(enumerate(self.all(step)), key=lambda found: found[1].at_least):
            if way.at_least >= best_us:
                break
            if (us := self.step_us(way)) < best_us:
                best, best_us = i, us
        lower, top = divmod(best, len(step.shared[0]))
        return best_us, [top, lower, *map(_fastest_alone, step.shared[2:])][: len(step.shared)]

    def choose(self, steps: Sequence[Step]) -> int:
        """Which of these steps to take; the first has no shared level, and others must beat it by the margin.

        Cost: as that of `least`, the last part for all steps together.
        """
        device = self.device
        enough = device.enough_us(self.plain_us(steps[0].last))
        factors = [device.harder(len(step.shared)) for step in steps]
        ways = [
            (way.at_least * factors[i], i, way) for i, step in enumerate(steps) if step.shared for way in self.all(step)
        ]
        best, best_us, least = 0, enough, enough * max(factors)
        for at_least, i, way in sorted(ways):
            if at_least >= least:
                break
            us = self.step_us(way)
            if us * factors[i] < least:
                best, best_us, least = i, us, us * factors[i]
        return best if best_us < enough else 0

    def _single(self, top: list[Body], last: Body) -> Iterator[Way]:
        device = self.device
        always = device.start_us + device.level_us + last[5]
        waits = device.fa2_waits * last[3] * last[2]
        for a in top:
            behind = self._least_beside(last, a[4], a[0]) + last[1] + device.last_us
            longest = max(a[0] + a[1] + (1 - a[6]) * waits, behind + a[1])
            yield Way(longest + a[5] + device.gather_us * a[6] + always, a, None, last)

    def _pairs(self, top: list[Body], lower: list[Body], last: Body) -> Iterator[Way]:
        device, halves = self.device, 2 * self.device.num_processors
        always = device.start_us + 2 * device.level_us + last[5]
        waits, posts = last[3] * last[2], last[1] + device.last_us
        for b in lower:
            b_us, b_post, b_filled, b_wave, b_held, b_merge, b_is_fa3 = b[:7]
            before = device.fa2_waits * (waits + b_wave * b_filled)
            for a in top:
                us, post, _, _, held, merge, is_fa3 = a[:7]
                together = min(held + b_held, halves)
                behind = self._least_beside(last, together, (us * held + b_us * b_held) / together)
                longest = max(us + post + (1 - is_fa3) * before, b_us + b_post, behind + posts + post + b_post)
                at_least = longest + merge + b_merge + device.gather_us * max(is_fa3, b_is_fa3) + always
                yield Way(at_least, a, b, last)

    def _least_beside(self, call: Body, held: float, until: float) -> float:
        """A call takes no less beside others that hold so many halves of multiprocessors until then.

        What is left to it reads at least at the pace at which so many blocks would if only reading took time.
        """
        if (pace := self._paces.get(held)) is None:
            halves = 2 * self.device.num_processors
            self._paces[held] = pace = (max(halves - held, 1) / halves) ** (1 - self.device.spread)
        flow = call[11]
        return max(until * (1 - pace) + flow if until * pace < flow else flow / pace, call[12], call[0])


def best_slices(device: Device, heads: Heads, shared: Sequence[Groups], last: Groups) -> tuple[float, list[int]] | None:
    """What `Device.best` says of one or two shared levels of groups that are alike; None where they are not.

    Cost: some two microseconds for each way to compute a call and for each two of them.
    """
    if not 1 <= len(shared) <= 2 or not len(last.rows) or (last.rows != last.rows[0]).any():
        return None
    ways = Ways(device, heads)
    slices: list[list[int]] = []
    calls: list[list[Body]] = []
    for level in shared:
        rows, tokens = level.rows.item(0), level.tokens.item(0)
        if (level.rows != rows).any() or (level.tokens != tokens).any():
            return None
        lists = Lists(len(level.rows), tokens, tokens * len(level.rows))
        its_slices, bodies = ways.shared(rows, lists, level.num_different, in_line=level.in_line)
        slices.append(its_slices)
        calls.append(bodies)
    count, longest, total = len(last.rows), int(last.tokens.max()), int(last.tokens.sum())
    lists = Lists(count, longest, total, None if count * longest == total else last.tokens)
    us, found = ways.least(Step(calls, ways.fa2(last.rows.item(0), lists, last.num_different)))
    return us, [its[n] for its, n in zip(slices, found, strict=True)]


def _fastest_alone(bodies: Sequence[Body]) -> int:
    return min(range(len(bodies)), key=lambda i: bodies[i][0] + bodies[i][1])
