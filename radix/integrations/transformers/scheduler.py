"""Which requests run, and what each step computes.

    submit ──▶ inbox ──▶ waiting ──admit──▶ running: prefilling ──▶ decoding ──▶ ended
                            ▲                              │
                            └────────── preempt ───────────┘   when no page is left for the next tokens

A step has a budget of tokens. Every decoding request gets one, what is left goes to prompts in chunks, oldest first.

Admission is in order of arrival, with three exceptions: a prompt that shares at least a page of uncached tokens with
one that is being computed waits for it to publish them, while others pass by; while nothing runs and pins hold the
pages of the first, those that need fewer go before it; and after a preemption nothing is admitted until a request ends,
so that two requests do not take each other's pages in turn. The oldest request is never preempted while another runs,
so it always comes to its end.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from attrs import define, field

from radix.integrations.transformers.cold_prompts import waits_for_another
from seqattn.errors import NoPageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from radix.cache import PrefixCache
    from radix.integrations.transformers.request import Request

__all__ = ["Batch", "Scheduler"]

#: stands for a token until it is known
_UNKNOWN = 0
#: steps after which what waits is tried again though no request has ended: others may have let go of pages
_PATIENCE = 16


class Batch(NamedTuple):
    """What one step computes.

    Attributes:
        requests: those that decode first, then those whose prompts are computed.
        num_decoding: how many decode.
        num_new: tokens of each, at least 1.
        on_the_way: tokens of each that a batch before it computes, which has not landed; empty if there is none.
    """

    requests: list[Request]
    num_decoding: int
    num_new: list[int]
    on_the_way: Sequence[int] = ()

    @property
    def lens(self) -> list[int]:
        """Tokens of each before the new ones."""
        done = [request.num_done for request in self.requests]
        return [n + more for n, more in zip(done, self.on_the_way, strict=True)] if self.on_the_way else done

    @property
    def decodes(self) -> bool:
        """Whether nothing but decoding is computed."""
        return self.num_decoding == len(self.requests)


@define(slots=True, eq=False)
class Scheduler:
    """Requests on their way through a cache; not safe for threads, but for `inbox.append`.

    A running request is a sequence of the cache under its id; from `end` or `preempt` on it is none.

    Attributes:
        cache: where they run.
        max_requests: that run at a time.
        max_tokens: of one step.
        on_short: what can let go of pages while nothing runs, and says whether it did.
        inbox: submitted, not yet seen.
        waiting: to be admitted, in order.
        running: in order of admission.
        is_holding: a request was preempted and none has ended since.
    """

    cache: PrefixCache
    max_requests: int
    max_tokens: int
    on_short: list[Callable[[], bool]] = field(factory=list)
    inbox: deque[Request] = field(factory=deque)
    waiting: deque[Request] = field(factory=deque)
    running: list[Request] = field(factory=list)
    is_holding: bool = False
    #: who has begun to start
    _starting: Request | None = None
    #: steps that may be launched ahead while what waits cannot start, as was found when it was last tried
    _patience: int = 0

    # -- a step -------------------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        """Admits requests, and makes room for the next tokens; what decodes is extended by its newest token.

        Raises:
            NoPageError: nothing runs, and the pages of all that it looks at are held by others, pins for example.
        """
        self.admit()
        decoding = self._extend([r for r in self.running if not r.is_prefilling])
        budget = self.max_tokens - len(decoding)
        requests, num_new = decoding[:], [1] * len(decoding)
        for request in self.running:
            if request.is_prefilling and budget:
                size = min(budget, len(request.todo) - request.num_done)
                requests.append(request)
                num_new.append(size)
                budget -= size
        return Batch(requests, len(decoding), num_new)

    def batch_after(self, batch: Batch) -> Batch | None:
        """What decodes after a batch that is on its way, extended by tokens that are not known yet.

        None where that batch decides what comes next: not all of a prompt is computed, forks begin with its tokens, or
        what waits may start when it has landed. Requests that end with it by their length are left out; those that it
        turns out to end otherwise are not.
        """
        if len(self.running) > len(batch.requests):  # the batch has no room for all
            return None
        self._collect()
        pairs = [(r, size) for r, size in zip(batch.requests, batch.num_new, strict=True) if not r.is_finished]
        if not batch.decodes and any(r.forks or r.num_done + size < len(r.todo) for r, size in pairs):
            return None
        going_on = [(r, size) for r, size in pairs if len(r.tokens) + 1 < r.max_new_tokens]
        if self.waiting and len(going_on) < self.max_requests:
            if not batch.decodes or not self._patience or len(going_on) < len(batch.requests):
                return None
            self._patience -= 1
        if not going_on:
            return None
        requests = [request for request, _ in going_on]
        try:
            self.cache.extend([request.id for request in requests], [_UNKNOWN] * len(requests))
        except NoPageError:
            return None
        return Batch(requests, len(requests), [1] * len(requests), [size for _, size in going_on])

    def tell(self, batch: Batch, tokens: dict[Request, int]) -> None:
        """The tokens that were not known when a batch was made ahead."""
        self.cache.amend([request.id for request in batch.requests], [tokens[request] for request in batch.requests])

    def land(self, batch: Batch, tokens: dict[Request, int], now: float) -> None:
        """The KV of a batch is written: requests and forks that begin with them take tokens, prompts are published."""
        for i, (request, size) in enumerate(zip(batch.requests, batch.num_new, strict=True)):
            if request.is_finished:  # cancelled on the way
                continue
            request.num_done += size
            for each in request.family():
                if each in tokens:
                    each.take(tokens[each], now)
            if i >= batch.num_decoding:
                request.num_computed_tokens += size
                self.cache.publish(request.id, num_tokens=request.num_done)

    def take_back(self) -> None:
        """Brings sequences to where their requests stand; whatever an error has left undone, the next step computes."""
        if self._starting is not None:
            self._start_anew(self._starting)
        for request in self.running:
            request.settle()
            known, num_prompt = request.num_known, len(request.todo)
            # Of a prompt whose token was not taken the last row is computed again.
            request.num_done = known if known >= num_prompt else min(request.num_done, known)
            length = max(known, num_prompt)
            if self.is_sequence(request) and self.cache.descriptor.num_tokens(request.id) > length:
                self.cache.truncate(request.id, length)

    def _extend(self, decoding: list[Request]) -> list[Request]:
        """Extends what decodes by one token each, preempting the newest requests until there is room."""
        while decoding:
            tokens = [request.tokens[-1] for request in decoding]
            try:
                self.cache.extend([request.id for request in decoding], tokens)
            except NoPageError:
                victim = max(self.running, key=lambda request: request.arrival)
                self.preempt(victim)
                decoding = [request for request in decoding if request is not victim]
            else:
                break
        return decoding

    # -- coming and going ---------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Starts what waits, while there is room."""
        self._collect()
        self._patience = _PATIENCE  # if others wait still, they cannot start now
        if self.is_holding and self.running:
            return
        short: NoPageError | None = None
        passed = 0  # looking at more than that would cost more with every request that waits
        while passed < min(len(self.waiting), self.max_requests) and len(self.running) < self.max_requests:
            request = self.waiting[passed]
            if waits_for_another(request, self.running, self.cache):
                passed += 1
                continue
            try:
                self._start(request)
            except NoPageError as error:
                self._starting = None
                passed += 1
                if self.running:
                    break
                short = short or error
        if short is not None and not self.running:
            raise short

    def _collect(self) -> None:
        """Empties the inbox; others may fill it meanwhile."""
        while self.inbox:
            if not self.waiting or self.waiting[-1] is not self.inbox[0]:  # it is where an interrupt came
                self.waiting.append(self.inbox[0])
            self.inbox.popleft()
            self._patience = 0

    def _start(self, request: Request) -> None:
        """Runs a request that waits. While nothing else does, what is only kept for later gives way to it."""
        todo, namespace = request.todo, request.namespace
        if not self.running:
            while not self.cache.can_start(todo, namespace=namespace) and any(each() for each in [*self.on_short]):
                pass
        self.cache.descriptor.refuse_running(request.id)  # it would be somebody else's
        self._starting = request
        started = self.cache.start(request.id, todo, namespace=namespace)
        request.begin(started.num_cached_tokens)
        self.running.append(request)
        self.waiting.remove(request)
        self._starting = None

    def _start_anew(self, request: Request) -> None:
        """Lets a request wait whose start was interrupted."""
        if request in self.running:
            self.running.remove(request)
        if self.is_sequence(request):
            self.cache.abort(request.id)
        if request not in self.waiting:
            self.waiting.appendleft(request)
        self._starting = None

    def fork(self, request: Request, child: Request) -> None:
        """Runs `child` from where `request` stands, if there is room; else it waits, to find what is published."""
        child.todo = request.todo
        if len(self.running) < self.max_requests:
            try:
                self.cache.fork(request.id, child.id)
            except NoPageError:
                pass
            else:
                child.begin(len(child.prompt))
                child.num_done = request.num_done
                self.running.append(child)
                return
        child.todo = child.all_tokens
        self.waiting.appendleft(child)

    def preempt(self, request: Request) -> None:
        """Publishes the full pages that a running request has computed, lets it go, and puts it first in the queue."""
        self.cache.publish(request.id, num_tokens=request.num_done)
        self.cache.abort(request.id)
        self.running.remove(request)
        request.put_back()
        self.waiting.appendleft(request)
        self.is_holding = True

    def end(self, request: Request) -> None:
        """Lets a request go, wherever it is; publishes what a running one has computed. Its forks wait alone."""
        if request in self.running:
            if self.is_sequence(request):
                self.cache.finish(request.id, num_tokens=request.num_done)
            self.running.remove(request)
            self.is_holding = False
        else:
            self._collect()
            if request in self.waiting:
                self.waiting.remove(request)
        self.waiting.extendleft(child for child in reversed(request.forks) if not child.is_finished)
        request.forks = []
        self._patience = 0

    def is_sequence(self, request: Request) -> bool:
        """Whether it is in the cache: not so where an interrupt came on its way in, or out."""
        return request.id in self.cache.descriptor.seq_id_to_data
