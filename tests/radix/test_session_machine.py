"""Lives of conversations drawn by Hypothesis, beside a model that knows what each holds and until when."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radix import Break, ChatSession, PrefixCache, Sessions
from seqattn import PageAllocator
from seqattn.errors import NoPageError
from tests.radix.tables import common_prefix

TIME_TO_LIVE = 5
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
IDS = st.integers(0, 3)


@dataclass
class Truth:
    """What a session holds."""

    tokens: tuple[int, ...]
    session: ChatSession
    closed_at: float | None = None
    closed_number: int = 0


class SessionMachine(RuleBasedStateMachine):
    """Four ids, tokens of two kinds, a pool so small that pages run out."""

    now: float = 0
    num_requests = 0
    num_closed = 0

    @initialize(page_size=st.sampled_from([1, 2, 4]), num_pages=st.integers(6, 30))
    def begin(self, page_size: int, num_pages: int) -> None:
        self.cache = PrefixCache(PageAllocator(num_pages, page_size))
        self.sessions = Sessions(self.cache, clock=lambda: self.now, time_to_live=TIME_TO_LIVE)
        self.truth: dict[int, Truth] = {}

    def expire(self) -> None:
        """Every call does so."""
        ended = [i for i, t in self.truth.items() if t.closed_at is not None and t.closed_at + TIME_TO_LIVE <= self.now]
        for session_id in ended:
            del self.truth[session_id]

    def an_open_one(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from([i for i, t in self.truth.items() if t.closed_at is None]))

    def any_open(self) -> bool:
        return any(t.closed_at is None for t in self.truth.values())

    @rule(session_id=IDS)
    def open(self, session_id: int) -> None:
        self.expire()
        session = self.sessions.open(session_id)
        truth = self.truth.setdefault(session_id, Truth((), session))
        assert truth.session is session
        truth.closed_at = None

    @precondition(any_open)
    @rule(data=st.data(), tokens=TOKENS, answer=TOKENS)
    def turn(self, data: st.DataObject, tokens: list[int], answer: list[int]) -> None:
        """A message that continues the conversation, and an answer."""
        truth = self.truth[self.an_open_one(data)]
        prompt = (*truth.tokens, *tokens)
        assert truth.session.update(prompt) is None
        truth.tokens = prompt
        self.expire()
        self.num_requests += 1
        try:
            self.cache.start(self.num_requests, prompt)
        except NoPageError:
            return
        try:
            self.cache.extend([self.num_requests], [answer])
        except NoPageError:
            self.cache.abort(self.num_requests)
            return
        num_computed = len(prompt) + len(answer) - 1
        self.cache.finish(self.num_requests, num_tokens=num_computed)
        truth.session.append(answer)
        truth.tokens = (*prompt, *answer)
        assert truth.session.num_pinned_tokens >= num_computed

    @precondition(any_open)
    @rule(data=st.data(), cut=st.integers(0, 20), tokens=TOKENS)
    def change_history(self, data: st.DataObject, cut: int, tokens: list[int]) -> None:
        """A prompt that perhaps leaves what is held, at a place that the model finds too."""
        truth = self.truth[self.an_open_one(data)]
        prompt = (*truth.tokens[:cut], *tokens)
        common = common_prefix(truth.tokens, prompt)
        self.sessions.on_break = None
        found = update_quietly(truth.session, prompt)
        self.expire()
        if common == len(truth.tokens):
            assert found is None
        else:
            assert found is not None
            assert (found.position, found.num_lost_tokens) == (common, len(truth.tokens) - common)
            assert found.held == truth.tokens[common : common + 8]
            assert found.given == prompt[common : common + 8]
        truth.tokens = prompt

    @precondition(any_open)
    @rule(data=st.data(), new_id=IDS)
    def fork(self, data: st.DataObject, new_id: int) -> None:
        truth = self.truth[self.an_open_one(data)]
        self.expire()
        if new_id not in self.truth:
            twin = truth.session.fork(new_id)
            assert twin.num_pinned_tokens >= truth.session.num_pinned_tokens
            self.truth[new_id] = Truth(truth.tokens, twin)

    @precondition(any_open)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        truth = self.truth[self.an_open_one(data)]
        num_tokens = data.draw(st.integers(0, len(truth.tokens)))
        truth.session.rollback(num_tokens)
        self.expire()
        truth.tokens = truth.tokens[:num_tokens]

    @precondition(any_open)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        truth = self.truth[self.an_open_one(data)]
        truth.session.close()
        self.num_closed += 1
        truth.closed_at, truth.closed_number = self.now, self.num_closed
        self.expire()

    @precondition(any_open)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        session_id = self.an_open_one(data)
        self.truth.pop(session_id).session.discard()
        self.expire()

    @rule(time=st.integers(1, 4))
    def wait(self, time: int) -> None:
        self.now += time

    @rule()
    def expire_next(self) -> None:
        closed = [(t.closed_number, i) for i, t in self.truth.items() if t.closed_at is not None]
        assert self.sessions.expire_next() == bool(closed)
        if closed:
            del self.truth[min(closed)[1]]

    @rule(num_pages=st.integers(1, 30))
    def evict(self, num_pages: int) -> None:
        self.cache.evict(num_pages)

    @invariant()
    def what_is_held_is_there(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        self.sessions.check()
        assert len(self.sessions) == len(self.truth)
        for truth in self.truth.values():
            session = truth.session
            assert tuple(session.tokens.tolist()) == truth.tokens
            assert session.is_open == (truth.closed_at is None)
            assert self.cache.match(truth.tokens).num_tokens >= session.num_pinned_tokens

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for truth in self.truth.values():
                if truth.session.is_open:
                    truth.session.close()
            self.now += TIME_TO_LIVE
            self.sessions.expire()
            self.cache.evict(self.cache.manager.num_pages)
            assert self.cache.manager.available_pages_count == self.cache.manager.num_pages, "pages are lost"
            assert not self.cache.state.pins


def update_quietly(session: ChatSession, prompt: tuple[int, ...]) -> Break | None:
    """`update` without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return session.update(prompt)


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(stateful_step_count=40)
