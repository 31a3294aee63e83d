"""Conversations in messages: an `Engine` computes, a `ChatSession` holds what is cached.

    message ──▶ chat template ──▶ text ──▶ tokens held + tokens of the new text ──▶ engine ──▶ answer
                all messages               session.update: warns if it breaks                  session.append

The text of an answer, encoded again, need not be the tokens that were generated. So as long as the template's text goes
on from the text of what is held, the tokens that are held stay, and only what follows is encoded. Where it does not,
those of the turns before that place stay.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from radix.integrations.transformers.reader import surely
from radix.integrations.transformers.text import render
from radix.session_store import Sessions
from radix.tokens import TOKEN_BYTES, common_bytes
from seqattn.counts import as_count
from seqattn.errors import BadValueError, SessionError

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Unpack

    from radix.cache import PrefixCache
    from radix.guard import Break
    from radix.integrations.transformers.engine import Engine
    from radix.integrations.transformers.request import Options, Piece, Request
    from radix.integrations.transformers.text import Tokenizer
    from radix.session import ChatSession

__all__ = ["Chat", "Message", "sessions_for"]

#: as chat templates take it: {"role": "user", "content": "…"}
Message = dict[str, Any]


def sessions_for(
    engine: Engine,
    *,
    clock: Callable[[], float] = time.monotonic,
    time_to_live: float = 600.0,
    on_break: Callable[[ChatSession, Break], None] | None = None,
) -> Sessions:
    """The sessions of an engine's cache, which show text where a prompt breaks; arguments as of `Sessions`, seconds.

    Where pages are short and nothing runs, closed ones end before their time, instead of a request that fails: as long
    as there are any, they have a place in `engine.on_short`.

    Raises:
        BadValueError: an engine without a tokenizer, or a negative time.
    """
    tokenizer = _tokenizer_of(engine)
    return _GivingWay(
        engine.on_short,
        engine.cache,
        clock=clock,
        time_to_live=time_to_live,
        decode=lambda ids: _decode(tokenizer, ids),
        on_break=on_break,
    )


class _GivingWay(Sessions):
    """Sessions that are among those who are asked for pages, from the first one on and until none is left."""

    def __init__(
        self,
        on_short: list[Callable[[], bool]],
        cache: PrefixCache,
        **options: Any,  # noqa: ANN401  those of Sessions
    ) -> None:
        super().__init__(cache, **options)
        self._on_short = on_short

    def _new(self, session_id: Hashable, namespace: Hashable) -> ChatSession:
        session = super()._new(session_id, namespace)
        if self.expire_next not in self._on_short:
            self._on_short.append(self.expire_next)
        return session

    def _forget(self, session: ChatSession) -> None:
        super()._forget(session)
        if not self._by_id and self.expire_next in self._on_short:
            self._on_short.remove(self.expire_next)


class Chat:
    """A conversation with a model.

        with sessions_for(engine).open("ann") as session:
            chat = Chat(engine, session, messages=[{"role": "system", "content": "Answer briefly."}])
            print(chat.ask("What is the capital of France?", max_new_tokens=32).text)
            for piece in chat.stream("And of Spain?"):
                print(piece.text, end="")

    Used by one thread at a time; many chats of one engine are answered together (`submit` each, `engine.step`, `accept`
    each).

    Args:
        engine: what answers; with a tokenizer that has a chat template.
        session: what holds the conversation; of the same cache.
        messages: what was said before, a system prompt for example.

    Attributes:
        engine, session: as given.
        messages: all that was said, the answers included.

    Raises:
        BadValueError: an engine without a tokenizer, or a session of another cache.
    """

    def __init__(self, engine: Engine, session: ChatSession, *, messages: Sequence[Message] = ()) -> None:
        _tokenizer_of(engine)
        if session.cache is not engine.cache:
            raise BadValueError(f"session {session.id!r} belongs to another cache than the engine's: open one of that")
        self.engine = engine
        self.session = session
        self.messages: list[Message] = list(messages)
        self._turns: list[tuple[int, int]] = []  # messages, and tokens held, before each turn
        self._asked: tuple[Request, Message] | None = None

    # -- asking -------------------------------------------------------------------------------------------------------

    def ask(self, message: str, **options: Unpack[Options]) -> Request:
        """Says something and waits for the answer; `options` are those of `Engine.submit`, in the session's namespace.

        Raises:
            SessionError: the session is closed, or the last message has not been answered.
            What `Engine.submit` and `Engine.step` raise; the message is taken back then.
        """
        request = self.submit(message, **options)
        try:
            self.engine.wait([request])
        except BaseException:
            self._interrupt(request)
            if request.tokens:  # without any, it is taken back already
                self.rollback()
            raise
        self.accept()
        return request

    def stream(self, message: str, **options: Unpack[Options]) -> Generator[Piece, None, None]:
        """Says something, and yields the answer as it comes. Who leaves the loop interrupts it: what was said stays."""
        request = self.submit(message, **options)
        try:
            yield from self.engine.follow(request)
        finally:
            self._interrupt(request)

    async def astream(self, message: str, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """`stream` for `async for`; who leaves that early closes it (`contextlib.aclosing`) before the next message."""
        request = self.submit(message, **options)
        try:
            async for piece in self.engine.afollow(request):
                yield piece
        finally:
            await surely(self._interrupt, request)

    def _interrupt(self, request: Request) -> None:
        """Ends an answer where it is, if it has not ended."""
        self.engine.cancel(request)
        self.accept()

    def submit(self, message: str, **options: Unpack[Options]) -> Request:
        """Queues a message; `accept` when the request is finished.

        Warns (`RetokenisationWarning`) if the chat template does not go on from what the session holds.

        Raises:
            SessionError: the session is closed, or the last message has not been answered.
            What `Engine.submit` raises; nothing has changed.
        """
        if not self.session.is_open or self._asked is not None:
            why = "is still being answered: accept the last request first" if self.session.is_open else "is closed"
            raise SessionError(f"session {self.session.id!r} {why}")
        turn = {"role": "user", "content": message}
        ids = self._encode([*self.messages, turn])
        options["namespace"] = self.session.namespace
        request = self.engine.submit(ids, **options)
        self._turns.append((len(self.messages), self.session.num_tokens))
        self._asked = request, turn
        try:
            self._update(ids)
        except BaseException:
            self._interrupt(request)
            raise
        return request

    def _update(self, ids: npt.NDArray[np.int32]) -> None:
        """The session's; a turn ends where its tokens are gone, also if that is told by raising."""
        held = self.session.tokens
        try:
            self.session.update(ids)
        finally:
            kept = common_bytes(held.tobytes(), self.session.tokens.tobytes()) // TOKEN_BYTES
            self._turns = [(count, min(num_tokens, kept)) for count, num_tokens in self._turns]

    def accept(self) -> None:
        """The request is finished: its answer is part of the conversation now, and pinned.

        If it was cancelled before its first token, the message is taken back.

        Raises:
            SessionError: nothing was asked, the request is not finished, or the session has been closed meanwhile.
                Nothing has changed.
        """
        if self._asked is None or not self._asked[0].is_finished:
            raise SessionError(f"session {self.session.id!r} has no finished request to accept")
        if not self.session.is_open:
            raise SessionError(f"session {self.session.id!r} is closed: its answer cannot be kept")
        request, turn = self._asked
        if not request.tokens:
            self._asked = None
            self.rollback()
            return
        answer, tokens = {"role": "assistant", "content": request.text}, request.tokens_of_text()
        self.session.append(tokens)
        self.messages += [turn, answer]
        self._asked = None

    # -- branches -----------------------------------------------------------------------------------------------------

    def rollback(self, num_turns: int = 1) -> None:
        """Takes back the last turns, a message and its answer each; what is cached of them is evicted first.

        Raises:
            LengthError: a negative number, or not an integer.
            BadValueError: more turns than there were.
            SessionError: the session is closed, or the last message has not been answered.
        """
        num_turns = as_count("num_turns", num_turns)
        self._refuse_unanswered()
        if num_turns > len(self._turns):
            raise BadValueError(f"{num_turns} turns cannot be taken back: there were {len(self._turns)}")
        if num_turns:
            num_messages, num_tokens = self._turns[-num_turns]
            self.session.rollback(min(num_tokens, self.session.num_tokens))
            del self._turns[-num_turns:], self.messages[num_messages:]

    def fork(self, new_id: Hashable) -> Chat:
        """Another chat that goes on from here in a session of its own, sharing what is cached.

        Raises:
            SessionError: the session is closed, `new_id` is in use, or the last message has not been answered.
        """
        self._refuse_unanswered()
        twin = Chat(self.engine, self.session.fork(new_id), messages=self.messages)
        twin._turns = self._turns[:]
        return twin

    def _refuse_unanswered(self) -> None:
        if self._asked is not None:
            raise SessionError(f"session {self.session.id!r} is still being answered: accept the last request first")

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _encode(self, messages: list[Message]) -> npt.NDArray[np.int32]:
        """The tokens of all messages, as far as possible those that are held."""
        tokenizer, held = _tokenizer_of(self.engine), self.session.tokens
        text = render(tokenizer, messages)

        def is_another(num_tokens: int) -> bool:
            return not text.startswith(_decode(tokenizer, held[:num_tokens].tolist()))

        if is_another(len(held)):
            lengths = self.session.lengths
            at = bisect_left(lengths, 1, key=is_another)  # where a prefix is another, so are all that are longer
            held = held[: lengths[at - 1] if at else 0]
        known = _decode(tokenizer, held.tolist())
        more = tokenizer(text[len(known) :], add_special_tokens=False)["input_ids"]
        return np.concatenate((held, np.array(more, dtype=np.int32)))


def _tokenizer_of(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None:
        raise BadValueError("messages need a tokenizer with a chat template: make the engine with one")
    return engine.tokenizer


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, with the special ones spelled out as a template does."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
