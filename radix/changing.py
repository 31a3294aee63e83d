"""Changing running sequences: more tokens, fewer tokens, one more of the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from radix.running import Running
from radix.tokens import TOKEN_BYTES
from seqattn.errors import LengthError
from seqattn.growth import Growth

if TYPE_CHECKING:
    from radix.state import State

__all__ = ["amend_all", "extend_all", "extend_one", "fork_one", "let_go_after"]


def extend_all(state: State, seq_ids: Sequence[Hashable], keys: Sequence[bytes]) -> None:
    """Appends tokens to running sequences, all or none; a shared last page that is partly filled is copied first.

    Raises:
        DuplicateSequenceError, LengthError, NoPageError: nothing has changed.

    Cost: next to nothing for one token that the last page of a sequence has room for.
    """
    if len(seq_ids) != len(keys) or state.manager.was_referenced_by_hand:
        _grow_all(state, seq_ids, keys)
        return
    state.descriptor.refuse_twice(seq_ids)
    page_size, running = state.tree.page_size, state.running
    within: list[tuple[Running, bytes]] = []
    growing: list[Hashable] = []
    their_keys: list[bytes] = []
    for seq_id, key in zip(seq_ids, keys, strict=True):
        run = running[seq_id]
        if len(key) == TOKEN_BYTES and 0 < run.last_page_len < page_size and not run.may_end_shared:
            within.append((run, key))
        else:
            growing.append(seq_id)
            their_keys.append(key)
    if growing:  # first: this may fail
        _grow_all(state, growing, their_keys)
    for run, key in within:
        run.last_page_len += 1
        run.tail += key


def _grow_all(state: State, seq_ids: Sequence[Hashable], keys: Sequence[bytes]) -> None:
    """`extend_all` for any number of tokens."""
    descriptor, reserve = state.descriptor, state.reserve
    growth = Growth.planned(descriptor, seq_ids, [len(key) // TOKEN_BYTES for key in keys])
    reservation = reserve.reserve(growth.num_pages)
    if growth.copy_ids:
        try:
            growth.copy(reservation.pages)
        except BaseException:
            reserve.cancel(reservation)
            raise
        for seq_id in growth.copy_ids:
            run = state.running[seq_id]
            let_go_after(state, run, run.num_pages - 1)
        state.stats.num_forked_pages += len(growth.copy_ids)
    growth.write(reservation.pages)
    if reservation.victims:
        counted = zip(seq_ids, growth.num_new_pages, strict=True)
        reserve.commit(reservation, "extend", [s for s, count in counted if count or s in growth.copy_ids])
    for seq_id, key in zip(seq_ids, keys, strict=True):
        run = state.running[seq_id]
        run.tail += key
        run.may_end_shared = False  # its last page is new, or was seen to be its own


def extend_one(state: State, seq_id: Hashable, run: Running, key: bytes) -> None:
    """`extend_all` for one sequence, without the lists that many need; raises what it raises."""
    manager, page_size, used = state.manager, state.tree.page_size, run.last_page_len
    num_tokens = len(key) // TOKEN_BYTES
    if used < page_size and (run.may_end_shared or manager.was_referenced_by_hand):
        # Once held alone it stays so until the next cut, but for references by hand.
        run.may_end_shared = not used or manager.ref_count.item(run.last_page) > 1
    if not num_tokens or not used or run.may_end_shared:
        extend_all(state, [seq_id], [key])
        return
    num_new, last = divmod(used + num_tokens - 1, page_size)
    if num_new:
        if not state.reserve.take(run.room(num_new), "extend", (seq_id,)):
            extend_all(state, [seq_id], [key])
            return
        run.lengthen(num_new)
        state.descriptor.tables_version += 1
    run.last_page_len = last + 1
    run.tail += key


def amend_all(state: State, seq_ids: Sequence[Hashable], runs: Sequence[Running], keys: Sequence[bytes]) -> None:
    """Puts another token in the place of the last one of each running sequence, all or none.

    Raises:
        DuplicateSequenceError, LengthError: nothing has changed.
    """
    if len(runs) != len(keys) or any(len(key) != TOKEN_BYTES for key in keys):
        raise LengthError(f"amend needs one token id for each of {len(runs)} sequences, not {len(keys)} entries")
    state.descriptor.refuse_twice(seq_ids)
    page_size = state.tree.page_size
    for seq_id, run in zip(seq_ids, runs, strict=True):
        if not run.tail or run.num_ids <= run.num_tree_pages * page_size:
            where = "published" if run.tail else "part of the prompt that it was started with"
            raise LengthError(f"the last token of {seq_id!r} is {where}: only one that extend has added can be amended")
    for run, key in zip(runs, keys, strict=True):
        run.tail[-TOKEN_BYTES:] = key


def fork_one(state: State, run: Running, seq_id: Hashable, new_seq_id: Hashable) -> None:
    """Starts a sequence with the tokens of `run`: full pages shared, a partly filled last page copied.

    Raises:
        DuplicateSequenceError, NoPageError: nothing has changed.
    """
    descriptor, reserve = state.descriptor, state.reserve
    reservation = reserve.reserve(descriptor.pages_to_fork(seq_id, new_seq_id))
    try:
        descriptor.copy_tail(seq_id, reservation.pages)
    except BaseException:
        reserve.cancel(reservation)
        raise
    reserve.commit(reservation, "fork", (new_seq_id,))
    table = descriptor.fork_table(seq_id, reservation.pages)
    new = Running(table, len(table), run.last_page_len, run.namespace, run.prompt)
    new.tail, new.request, new.is_detached = run.tail[:], None, run.is_detached
    if run.node is not None:
        new.num_tree_pages = min(run.num_tree_pages, len(table) - len(reservation.pages))
    if run.node is not None and new.num_tree_pages:
        new.node = state.tree.cut(run.node, run.num_tree_pages, new.num_tree_pages)
        state.tree.hold(new.node)
    descriptor.add(new_seq_id, new)
    state.stats.num_forked_pages += len(reservation.pages)


def let_go_after(state: State, run: Running, num_pages: int) -> None:
    """Ends a sequence's hold on tree pages after its first `num_pages`; references are the caller's to settle."""
    if run.node is not None and run.num_tree_pages > num_pages:
        above = state.tree.cut(run.node, run.num_tree_pages, num_pages)
        state.tree.release(run.node, above)
        run.node = above if num_pages else None
        run.num_tree_pages = num_pages
        run.held = None
