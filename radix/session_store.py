"""The conversations of a cache: which are open, and how long the closed ones stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from radix.proof import path_key
from radix.session import ChatSession
from radix.tokens import TOKEN_BYTES, common_bytes
from seqattn.errors import BadValueError, InvariantError, SessionError

if TYPE_CHECKING:
    from radix.cache import PrefixCache
    from radix.guard import Break
    from radix.show import Decode

__all__ = ["Sessions"]


class Sessions:
    """The conversations of one cache, by id.

    Pinned pages cannot be evicted. Where they are too many, end some early: `expire_next`.

    Invariants (`check()`):

    - L1 closed sessions have an id that is known, and stand in the order in which they were closed.
    - L2 what a session has pinned is a prefix of its tokens.

    Args:
        cache: where they are cached and pinned.
        clock: asked for the time, in any unit: `time.monotonic`, or a function of a test.
        time_to_live: how long a closed session stays pinned, in that unit; 0 for not at all.
        decode: turns token ids into text: to show where a prompt leaves what is held, and to find out why.
        on_break: called with the session and the `Break` when a prompt does.

    Raises:
        BadValueError: a negative `time_to_live`, or not a number.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        clock: Callable[[], float],
        time_to_live: float = 600.0,
        decode: Decode | None = None,
        on_break: Callable[[ChatSession, Break], None] | None = None,
    ) -> None:
        given: object = time_to_live
        if not isinstance(given, (int, float)) or not given >= 0:
            raise BadValueError(f"time_to_live must be a number of at least 0, not {time_to_live!r}")
        self.cache = cache
        self.clock = clock
        self.time_to_live = time_to_live
        self.decode = decode
        self.on_break = on_break
        self._by_id: dict[Hashable, ChatSession] = {}
        self._closed: dict[Hashable, float] = {}  # and when: what was closed first stands first

    def __len__(self) -> int:
        """Sessions that are open, or closed and not expired when last looked."""
        return len(self._by_id)

    def open(self, session_id: Hashable, *, namespace: Hashable = None) -> ChatSession:
        """The session of this id: a new one without tokens, or the one that there is, opened again if it was closed.

        Args:
            session_id: any hashable value.
            namespace: under which its tokens are cached; the same each time.

        Raises:
            BadValueError: an id or a namespace that cannot be hashed.
            SessionError: there is a session of this id in another namespace.
        """
        with self.cache.lock:
            self.expire()
            session = self._get(session_id)
            if session is None:
                _refuse_unhashable("namespace", namespace)
                return self._new(session_id, namespace)
            if not (session.namespace is namespace or session.namespace == namespace):
                raise SessionError(
                    f"session {session_id!r} is in namespace {session.namespace!r}, not in {namespace!r}: "
                    "open it there, or use another id"
                )
            session.is_open = True
            self._closed.pop(session_id, None)
            return session

    def expire(self) -> int:
        """Forgets the closed sessions whose time has come, and unpins them; returns how many.

        Every call on a session does so as well. O(what expires).
        """
        num_forgotten = 0
        with self.cache.lock:
            now = self.clock() if self._closed else 0.0
            while self._closed and next(iter(self._closed.values())) + self.time_to_live <= now:
                num_forgotten += self.expire_next()
        return num_forgotten

    def expire_next(self) -> bool:
        """Forgets the session that was closed first, before its time, as when pages are short; False if none is."""
        with self.cache.lock:
            session_id = next(iter(self._closed), None)
            if not self._closed:
                return False
            self._forget(self._by_id[session_id])
            return True

    def check(self) -> None:
        """Recomputes L1 and L2; O(tokens).

        Raises:
            InvariantError: naming the invariant.
        """
        with self.cache.lock:
            closed = [session.id for session in self._by_id.values() if not session.is_open]
            times = list(self._closed.values())
            if set(closed) != set(self._closed) or times != sorted(times):
                raise InvariantError("L1", f"sessions {closed!r} are closed, but noted are {self._closed!r}")
            for session in self._by_id.values():
                self._check_pin(session)

    def _check_pin(self, session: ChatSession) -> None:
        """L2, for one session."""
        for pin in session._pin._pins if session._pin is not None else []:
            if pin.node is not None:  # or else the cache was cleared
                common = common_bytes(path_key(pin.node), session.tokens.tobytes()) // TOKEN_BYTES
                if common < session.num_pinned_tokens:
                    raise InvariantError("L2", f"{session!r} has pinned other tokens than its own")

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _get(self, session_id: Hashable) -> ChatSession | None:
        _refuse_unhashable("session_id", session_id)
        return self._by_id.get(session_id)

    def _new(self, session_id: Hashable, namespace: Hashable) -> ChatSession:
        if self._get(session_id) is not None:
            raise SessionError(f"session {session_id!r} exists: use another id, or discard it first")
        session = self._by_id[session_id] = ChatSession(self, session_id, namespace)
        return session

    def _close(self, session: ChatSession) -> None:
        last = next(reversed(self._closed.values()), -math.inf)
        self._closed[session.id] = max(last, self.clock())  # a clock that was set back lets nobody overtake
        session.is_open = False
        self.expire()

    def _forget(self, session: ChatSession) -> None:
        """Unpins a session; it cannot be used any more."""
        session.is_open = False
        session._let_go()
        del self._by_id[session.id]
        self._closed.pop(session.id, None)


def _refuse_unhashable(name: str, value: Hashable) -> None:
    try:
        hash(value)
    except TypeError as error:
        raise BadValueError(f"{name} must be hashable, not {value!r}: {error}") from None
