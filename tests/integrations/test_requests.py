"""How requests come and go: joining, waiting, preemption, forks, cancelling, failing; and what they say about it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from radix import PrefixCache
from radix.integrations.transformers import Engine, Request, Sampling, manager_for
from seqattn import SeqAttnError
from tests.integrations.models import Untyped, check_all_free, engine_for, generated, make, prompt

pytest.importorskip("transformers", reason="needs the extra chat")


def test_requests_join_and_leave_between_steps() -> None:
    engine = engine_for()
    first = engine.submit(prompt(1, 20), max_new_tokens=12)
    for _ in range(4):
        engine.step()
    second = engine.submit(prompt(2, 9), max_new_tokens=3)
    assert (first.is_finished, second.tokens, engine.num_waiting) == (False, [], 1)
    assert engine.step() == [first, second]
    while not second.is_finished:
        engine.step()
    assert (engine.num_running, len(first.tokens)) == (1, 7)
    engine.wait([first])
    for request in (first, second):
        assert request.tokens == generated("Llama", request.prompt.tolist(), request.max_new_tokens)
    assert engine.step() == []
    check_all_free(engine)


def test_a_long_prompt_is_computed_in_chunks_beside_answers_that_go_on() -> None:
    engine = engine_for(max_requests=4, max_tokens_per_step=10)
    answering = engine.submit(prompt(1, 4), max_new_tokens=30, stop_tokens=())
    engine.step()
    long = engine.submit(prompt(2, 45), max_new_tokens=2)
    for num_done in (9, 18, 27, 36):
        assert engine.step() == [answering]
        assert long.num_done == num_done
        assert engine.cache.match(long.prompt).num_tokens == num_done // 8 * 8, "published chunk by chunk"
    assert engine.step() == [answering, long]
    assert (len(answering.tokens), long.num_computed_tokens) == (6, 45)
    engine.wait([answering, long])


def test_what_waits_for_pages_runs_later_in_order_of_arrival() -> None:
    engine = engine_for(num_pages=8)  # 64 tokens
    requests = [engine.submit(prompt(i, 25), max_new_tokens=6, stop_tokens=()) for i in range(5)]
    ended: list[Request] = []
    while len(ended) < len(requests):
        assert engine.num_running <= 2
        ended += [request for request in engine.step() if request.is_finished]
    assert ended == requests
    assert [request.num_preemptions for request in requests] == [0] * 5
    check_all_free(engine)


def test_a_request_without_room_is_preempted_publishes_what_it_has_and_goes_on_from_there() -> None:
    engine = engine_for(num_pages=8)
    old = engine.submit(prompt(1, 24), max_new_tokens=30, stop_tokens=())
    new = engine.submit(prompt(2, 24), max_new_tokens=30, stop_tokens=())
    while not new.num_preemptions:
        engine.step()
        engine.cache.check()
    assert old.num_preemptions == 0
    have = len(new.prompt) + len(new.tokens)
    assert engine.cache.match(new.all_tokens).num_tokens >= (have - 1) // 8 * 8 - 8, "a page may be gone already"
    assert engine.num_running == 1
    engine.wait([old, new])
    for request in (old, new):
        whole = np.concatenate((request.prompt, request.tokens))
        with torch.no_grad():
            dense = make("Llama")(torch.from_numpy(whole)[None]).logits[0].argmax(-1).tolist()
        assert request.tokens == dense[len(request.prompt) - 1 : -1]
    assert engine.cache.stats.num_requests == 2, "a request that was put back counts once"
    assert new.num_cached_tokens == 0, "the figure is that of the first start"
    assert new.num_computed_tokens > 24, "computed again: what had no full page or was evicted"
    check_all_free(engine)


def test_the_oldest_request_is_never_preempted() -> None:
    engine = engine_for(num_pages=8)
    requests = [engine.submit(prompt(i, 10), max_new_tokens=40, stop_tokens=()) for i in range(6)]
    engine.wait(requests)
    assert requests[0].num_preemptions == 0
    assert sum(request.num_preemptions for request in requests) > 0
    assert all(len(request.tokens) == 40 for request in requests)
    check_all_free(engine)


def test_equal_cold_prompts_are_computed_once() -> None:
    engine = engine_for(max_tokens_per_step=64)
    ids = prompt(1, 50)
    requests = engine.generate([ids] * 4 + [ids[:43] + prompt(2, 5)], max_new_tokens=4)
    assert [request.num_computed_tokens for request in requests] == [50, 2, 2, 2, 5]
    assert {tuple(request.tokens) for request in requests[:4]} == {tuple(generated("Llama", ids, 4))}
    check_all_free(engine)


def test_who_waits_for_an_equal_prompt_lets_others_pass() -> None:
    engine = engine_for(max_requests=4, max_tokens_per_step=8)
    ids, other = prompt(1, 40), prompt(2, 3)
    leader, same, passing = (engine.submit(p, max_new_tokens=2, stop_tokens=()) for p in (ids, ids, other))
    engine.step()
    assert engine.scheduler.running == [leader, passing]
    assert list(engine.scheduler.waiting) == [same]
    engine.wait([leader, same, passing])
    assert (leader.num_computed_tokens, same.num_computed_tokens) == (40, 1)


def test_a_prompt_waits_only_as_long_as_the_other_has_something_to_publish_for_it() -> None:
    engine = engine_for(max_requests=4, max_tokens_per_step=8)
    ids = prompt(1, 80)
    leader = engine.submit(ids, max_new_tokens=1)
    sharing = engine.submit(ids[:16] + prompt(2, 4), max_new_tokens=1)
    for _ in range(3):
        engine.step()
    assert leader.is_prefilling
    assert sharing.num_cached_tokens == 16
    engine.cancel(leader)
    assert engine.wait([sharing])[0].num_computed_tokens == 4


def test_who_waits_goes_on_when_the_other_is_cancelled() -> None:
    engine = engine_for(max_requests=4, max_tokens_per_step=8)
    ids = prompt(1, 40)
    leader, same = (engine.submit(ids, max_new_tokens=3) for _ in range(2))
    engine.step()
    engine.cancel(leader)
    engine.wait([same])
    assert (leader.tokens, leader.finish_reason) == ([], "cancelled")
    assert (same.num_cached_tokens, same.tokens) == (8, generated("Llama", ids, 3))
    check_all_free(engine)


def test_prompts_of_two_namespaces_share_nothing_and_wait_for_none() -> None:
    engine = engine_for()
    ids = prompt(1, 40)
    requests = [engine.submit(ids, max_new_tokens=2, namespace=tenant) for tenant in ("a", "b")]
    engine.step()
    assert [request.num_done for request in requests] == [40, 40]
    engine.wait(requests)
    (again,) = engine.generate([ids], max_new_tokens=2, namespace="a")
    assert again.num_cached_tokens == 39
    check_all_free(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 6])
def test_a_cancelled_request_gives_its_pages_back_and_publishes_what_it_computed(num_steps: int) -> None:
    engine = engine_for(max_requests=4, max_tokens_per_step=16)
    request, other = (engine.submit(prompt(i, 30), max_new_tokens=20, stop_tokens=()) for i in range(2))
    for _ in range(num_steps):
        engine.step()
    num_done = request.num_done
    engine.cancel(request)
    engine.cancel(request)
    assert request.finish_reason == "cancelled"
    assert engine.cache.match(request.all_tokens).num_tokens == num_done
    engine.cache.check()
    assert len(engine.wait([other])[0].tokens) == 20
    check_all_free(engine)


def test_forks_of_a_waiting_request_begin_with_its_first_token_and_share_its_prompt() -> None:
    engine = engine_for()
    ids = prompt(3, 29)
    request = engine.submit(ids, max_new_tokens=6, sampling=Sampling(temperature=2.0, seed=0), stop_tokens=())
    forks = [engine.fork(request, sampling=Sampling(temperature=2.0, seed=seed)) for seed in range(1, 5)]
    engine.step()
    assert engine.num_running == 5
    tables = [engine.cache.descriptor.seq_id_to_data[each.id].kv_page_indices for each in (request, *forks)]
    assert len({tuple(table[:3]) for table in tables}) == 1, "full pages are shared"
    assert len({table[3] for table in tables}) == 5, "the tail page is copied"
    assert [fork.num_computed_tokens for fork in forks] == [0] * 4
    engine.wait([request, *forks])
    for seed, each in enumerate((request, *forks)):
        alone = engine_for().generate(
            [ids], max_new_tokens=6, sampling=Sampling(temperature=2.0, seed=seed), stop_tokens=()
        )
        assert each.tokens == alone[0].tokens
    check_all_free(engine)


def test_a_fork_that_finds_no_room_waits_and_answers_all_the_same() -> None:
    engine = engine_for(num_pages=6)
    request = engine.submit(prompt(1, 30), max_new_tokens=10, stop_tokens=())
    forks = [engine.fork(request, sampling=Sampling()) for _ in range(3)]
    engine.step()
    assert engine.num_running < 4
    engine.wait([request, *forks])
    assert {tuple(each.tokens) for each in (request, *forks)} == {tuple(request.tokens)}
    check_all_free(engine)


def test_forks_of_a_cancelled_request_and_cancelled_forks_harm_nobody() -> None:
    engine = engine_for()
    request = engine.submit(prompt(1, 30), max_new_tokens=5)
    kept, dropped = (engine.fork(request, sampling=Sampling()) for _ in range(2))
    engine.cancel(dropped)
    engine.cancel(request)
    engine.wait([kept])
    assert kept.tokens == generated("Llama", prompt(1, 30), 5)
    assert (dropped.tokens, dropped.finish_reason) == ([], "cancelled")
    with pytest.raises(SeqAttnError, match="finished and cannot be forked"):
        engine.fork(kept, sampling=Sampling())
    check_all_free(engine)


def test_forks_of_forks_that_wait_begin_together() -> None:
    for num_pages in (64, 6):
        engine = engine_for(num_pages=num_pages)
        first = engine.submit(prompt(1, 30), max_new_tokens=5)
        second = engine.fork(first, sampling=Sampling())
        third, dropped = (engine.fork(second, sampling=Sampling()) for _ in range(2))
        under_dropped = engine.fork(dropped, sampling=Sampling())
        engine.cancel(dropped)
        engine.wait([first, second, third, under_dropped])
        for each in (first, second, third, under_dropped):
            assert each.tokens == generated("Llama", prompt(1, 30), 5)
        check_all_free(engine)


def test_a_preempted_request_can_be_forked() -> None:
    engine = engine_for(num_pages=8)
    old, new = (engine.submit(prompt(i, 24), max_new_tokens=30, stop_tokens=()) for i in range(2))
    while not new.num_preemptions:
        engine.step()
    fork = engine.fork(new, sampling=Sampling())
    engine.wait([old, new, fork])
    assert fork.tokens == new.tokens
    check_all_free(engine)


def test_a_step_that_fails_leaves_requests_where_they_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(max_requests=4, max_tokens_per_step=20)
    requests = [engine.submit(prompt(i, 30), max_new_tokens=8) for i in range(2)]
    for _ in range(2):
        engine.step()
    forward, failures = engine.model.forward, iter([True, False, True])

    def fails_now_and_then(*args: Untyped, **kwargs: Untyped) -> Untyped:
        output = forward(*args, **kwargs)
        if next(failures, False):
            raise RuntimeError("out of memory")
        return output

    monkeypatch.setattr(engine.model, "forward", fails_now_and_then)
    for expected in (True, False, True):
        before = [(request.num_done, request.tokens[:]) for request in requests]
        if expected:
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.step()
            assert [(request.num_done, request.tokens) for request in requests] == before
        else:
            engine.step()
        engine.cache.check()
    engine.wait(requests)
    for request in requests:
        assert request.tokens == generated("Llama", request.prompt.tolist(), 8)
    check_all_free(engine)


def test_a_request_of_another_engine_is_not_waited_for_forever() -> None:
    request = engine_for().submit(prompt(1, 4), max_new_tokens=4)
    with pytest.raises(SeqAttnError, match="'request 0' is no request of this engine"):
        engine_for().wait([request])


def test_a_request_of_another_engine_is_neither_cancelled_nor_forked() -> None:
    engine, other = engine_for(), engine_for()
    request, own = engine.submit(prompt(1, 4), max_new_tokens=4), other.submit(prompt(2, 4), max_new_tokens=4)
    assert request.id == own.id
    for call in (lambda: other.cancel(request), lambda: other.fork(request, sampling=Sampling())):
        with pytest.raises(SeqAttnError, match="'request 0' is no request of this engine"):
            call()
    assert (request.finish_reason, request.forks, other.num_waiting) == (None, [], 1)
    for each, ids in ((engine.wait([request])[0], prompt(1, 4)), (other.wait([own])[0], prompt(2, 4))):
        assert each.tokens == generated("Llama", ids, 4)


def test_ids_of_the_engine_pass_by_those_that_are_taken() -> None:
    engine = engine_for()
    taken = engine.submit(prompt(1, 4), max_new_tokens=2, request_id="request 1")
    free = engine.generate([prompt(2, 4), prompt(3, 4)], max_new_tokens=2)
    assert len({request.id for request in (taken, *free)}) == 3


def test_times_come_from_the_clock_that_was_given() -> None:
    now = [0.0]
    engine = engine_for(clock=lambda: now[0], max_requests=4, max_tokens_per_step=8)
    request = engine.submit(prompt(1, 20), max_new_tokens=3, stop_tokens=())
    while not request.is_finished:
        assert request.time_to_first_token == (None if now[0] < 3 else 3.0)
        now[0] += 1
        engine.step()
    assert (request.submitted_at, request.first_token_at, request.finished_at) == (0.0, 3.0, 5.0)


def test_two_engines_take_turns_on_one_model_and_one_cache() -> None:
    model = make("Llama")
    cache = PrefixCache(manager_for(model, num_pages=64, page_size=8))
    engines = [Engine(model, None, cache, name=name) for name in ("a", "b")]
    requests = [engine.submit(prompt(i, 20), max_new_tokens=4) for i, engine in enumerate(engines)]
    for _ in range(4):
        for engine in engines:
            engine.step()
    assert [request.id for request in requests] == ["a 0", "b 0"]
    third = Engine(model, None, cache, name="c")
    for engine in (*engines, third):
        engine.close()
    assert model.config._attn_implementation == "sdpa"
    for request in requests:
        assert request.tokens == generated("Llama", request.prompt.tolist(), 4)


def test_closing_cancels_everything_and_gives_the_model_back() -> None:
    model = make("Llama")
    before = model.config._attn_implementation
    with Engine.for_model(model, num_pages=64) as engine:
        running, waiting = (engine.submit(prompt(i, 20), max_new_tokens=4) for i in range(2))
        engine.step()
        fork = engine.fork(waiting, sampling=Sampling())
        with pytest.raises(SeqAttnError, match=r"call engine\.close\(\)"):
            model(torch.tensor([[3]]))
    assert {each.finish_reason for each in (running, waiting, fork)} == {"cancelled"}
    assert model.config._attn_implementation == before
    check_all_free(engine)
    want = generated("Llama", prompt(1, 6), 4)
    assert model.generate(torch.tensor([prompt(1, 6)]), max_new_tokens=4, do_sample=False)[0, 6:].tolist() == want
    assert engine.generate([prompt(1, 6)], max_new_tokens=4)[0].tokens == want, "the next step takes the model again"


def test_many_threads_submit_wait_and_cancel() -> None:
    engine = engine_for(max_requests=8)
    failures: list[BaseException] = []

    def live(number: int) -> None:
        try:
            for turn in range(3):
                ids = prompt(number * 10 + turn, 5 + number)
                request = engine.submit(ids, max_new_tokens=6)
                if turn == 1:
                    engine.cancel(request)
                    continue
                assert [t for piece in engine.follow(request) for t in piece.tokens] == generated("Llama", ids, 6)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    check_all_free(engine)
