"""Conversations: what each holds of the cache, and for how long.

    open ──▶ update(prompt) ──▶ … an answer is computed … ──▶ append(answer) ──▶ … ──▶ close
              │ the new prompt must begin with what is held    │ what is cached of it     │ stays pinned for
              │ (the guard), or it is said where it does not   │ is pinned                │ time_to_live
    fork: another conversation with the same tokens      rollback: back to an earlier length; what came after goes first

A session deals in tokens: which model computes them, and how text becomes tokens, is not its business. It computes and
caches nothing: it pins what others have cached. There is no clock and no thread of its own: the caller's clock is asked
in each call, and what has outlived its time is let go then.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import TYPE_CHECKING

from radix.guard import Break, RetokenisationWarning, compare
from radix.tokens import TOKEN_BYTES, Tokens, as_key, token_ids
from seqattn.counts import as_count
from seqattn.errors import BadValueError, SessionError

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from radix.cache import PrefixCache
    from radix.pin import Pinned
    from radix.session_store import Sessions

__all__ = ["ChatSession"]


class ChatSession:
    """One conversation. Made by `Sessions.open` or `fork`; as a context manager it is closed at the end of the block.

    While it is open, and for a time after, the cached pages of its tokens are pinned: they cannot be evicted. Methods
    are atomic under the cache's lock; a call that raises leaves everything as it was.

    Attributes:
        id: as given to `open` or `fork`.
        namespace: under which its tokens are cached.
        is_open: whether it may be used; `open` with its id opens it again until it has expired.
        lengths: how many tokens it held after each `append` and `update`; for `rollback`.
        num_pinned_tokens: how many of its tokens were cached when it last looked: after `append`, `update`, `rollback`
            and `fork`.
        last_break: where the last prompt that did not continue this conversation left it; None if each did.
    """

    def __init__(self, sessions: Sessions, session_id: Hashable, namespace: Hashable) -> None:
        self.id = session_id
        self.namespace = namespace
        self.is_open = True
        self.lengths: list[int] = []
        self.num_pinned_tokens = 0
        self.last_break: Break | None = None
        self._sessions = sessions
        self._key = b""
        self._num_inherited = 0
        self._pin: Pinned | None = None
        self._superseded: list[tuple[bytes, int]] = []

    def __repr__(self) -> str:
        """Its size and state."""
        state = "open" if self.is_open else "closed"
        return f"<ChatSession {self.id!r}: {self.num_tokens} tokens, {self.num_pinned_tokens} pinned, {state}>"

    def __enter__(self) -> ChatSession:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it, unless that has been done."""
        with self.cache.lock:
            if self.is_open:
                self.close()

    @property
    def cache(self) -> PrefixCache:
        """The cache that it holds its tokens in."""
        return self._sessions.cache

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """What it holds, int32, read-only: the prompt of the next turn begins with it."""
        return token_ids(self._key)

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds."""
        return len(self._key) // TOKEN_BYTES

    def append(self, tokens: Tokens) -> None:
        """The conversation goes on with these tokens: a message, or an answer as it was generated.

        Pins all that is cached of the conversation now.

        Raises:
            TokenError: not token ids.
            SessionError: it is closed.

        Cost: O(tokens held), and the pin's.
        """
        more = as_key(tokens)
        with self.cache.lock:
            self._begin()
            self._continue(self._key + more)

    def update(self, prompt: Tokens) -> Break | None:
        """The conversation as a whole is this now, rendered anew by a chat template: it should begin with what is held.

        If it does not, what is held from there on is lost. That is warned of (`RetokenisationWarning`), told to the
        `on_break` of `Sessions`, kept in `last_break` and returned; the session goes on with the new prompt, and the
        old end is evicted first.

        Raises:
            TokenError: not token ids.
            SessionError: it is closed.
            RetokenisationWarning: where warnings are errors; nothing has changed.
            What `on_break` raises; the session holds the new prompt then.

        Cost: O(tokens), and the pin's.
        """
        key = as_key(prompt)
        with self.cache.lock:
            self._begin()
            num_first = self.lengths[0] if self.lengths else 0
            found = compare(self._key, key, num_first=num_first, decode=self._sessions.decode)
            if found is None:
                self._continue(key)
                return None
            # First of all: where warnings are errors, nothing has changed.
            warnings.warn(f"session {self.id!r}: {found}", RetokenisationWarning, stacklevel=2)
            self.last_break = found
            self._supersede(found.position)
            self._continue(key)
        if self._sessions.on_break is not None:
            self._sessions.on_break(self, found)
        return found

    def rollback(self, num_tokens: int) -> None:
        """Takes back everything after the first `num_tokens` tokens; what is cached of that is evicted first.

        Args:
            num_tokens: how many stay: one of `lengths`, or any other number up to `num_tokens`.

        Raises:
            LengthError: negative, or not an integer.
            BadValueError: more than it holds.
            SessionError: it is closed.
        """
        num_tokens = as_count("num_tokens", num_tokens)
        with self.cache.lock:
            self._begin()
            if num_tokens > self.num_tokens:
                raise BadValueError(f"session {self.id!r} holds {self.num_tokens} tokens: it cannot keep {num_tokens}")
            if num_tokens < self.num_tokens:
                self._supersede(num_tokens)

    def fork(self, new_id: Hashable) -> ChatSession:
        """Another open session with the same tokens: a branch, or one of several answers.

        The cached pages are shared. What each appends is its own: the page in which they part is copied when it is
        computed, no other.

        Raises:
            SessionError: it is closed, or `new_id` is in use.
        """
        sessions = self._sessions
        with sessions.cache.lock:
            self._begin()
            twin = sessions._new(new_id, self.namespace)
            twin.lengths = self.lengths[:]
            twin._key, twin._num_inherited = self._key, self.num_tokens
            twin._hold()
            return twin

    def close(self) -> None:
        """Ends its use for now: it stays pinned, and can be opened again, for `time_to_live`.

        Raises:
            SessionError: it is closed.
        """
        with self.cache.lock:
            self._begin()
            self._sessions._close(self)
            self._demote_superseded()

    def discard(self) -> None:
        """Ends it for good: nothing is pinned, and what only it has is evicted first, for a fork from where it parted.

        For the branches of best-of-n that lost.

        Raises:
            SessionError: it is closed.
        """
        with self.cache.lock:
            self._begin()
            self._sessions._forget(self)
            self._superseded.append((self._key, min(self._num_inherited, self.num_tokens)))
            self._demote_superseded()

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Refuses a closed session, and lets go of what has expired."""
        if not self.is_open:
            raise SessionError(f"session {self.id!r} is closed: open it again by its id")
        self._sessions.expire()

    def _continue(self, key: bytes) -> None:
        self._key = key
        self.lengths.append(self.num_tokens)
        self._hold()

    def _hold(self) -> None:
        """Pins what is cached of its tokens now, and lets go of what was pinned before."""
        old, self._pin = self._pin, self.cache.pin(self.tokens, namespace=self.namespace)
        self.num_pinned_tokens = self._pin.__enter__().num_tokens
        if old is not None:
            old.__exit__(None, None, None)
        if self._superseded and self.num_pinned_tokens > self._superseded[-1][1]:
            self._demote_superseded()

    def _let_go(self) -> None:
        if self._pin is not None:
            self._pin.__exit__(None, None, None)
            self._pin, self.num_pinned_tokens = None, 0

    def _supersede(self, num_kept: int) -> None:
        """Keeps the first tokens; the page that they end in is still needed, to copy what is kept of it."""
        old = self._key
        self._key = old[: num_kept * TOKEN_BYTES]
        self._num_inherited = min(self._num_inherited, num_kept)
        self.lengths = [length for length in self.lengths if length <= num_kept]
        self._hold()
        self.cache.demote(token_ids(old), after=num_kept, namespace=self.namespace)
        self._superseded.append((old, num_kept))

    def _demote_superseded(self) -> None:
        """What was taken back is not needed any more, the page included that was kept to be copied."""
        cache = self.cache
        for key, num_kept in self._superseded:
            cache.demote(token_ids(key), after=num_kept - num_kept % cache.tree.page_size, namespace=self.namespace)
        self._superseded.clear()
