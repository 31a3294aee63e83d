"""`Engine`: many requests through one model, sharing what is computed.

    step()   admit ─▶ extend by one token each ─▶ pack and plan once ─▶ forward of all rows ─▶ sample ─▶ publish, finish
                      prompts in chunks           plain for append,     model(input_ids [1, rows],
                                                  levels for attention        radix_step=Step)

On CUDA the next step is launched before the tokens of this one are read (`flight`), so that the device does not wait.

What a request has computed becomes a prefix for others: page by page while its prompt is computed, the rest when it
ends or is preempted. The token that was chosen last has no KV yet; it gets one when it is fed back, or never.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from radix.cache import PrefixCache
from radix.integrations.transformers.asked import request_for
from radix.integrations.transformers.flight import Steps
from radix.integrations.transformers.model import manager_for
from radix.integrations.transformers.open_requests import OpenRequests
from radix.integrations.transformers.reader import Reader, surely
from radix.integrations.transformers.request import Options, Piece, Request
from radix.integrations.transformers.runner import Packing, Runner
from radix.integrations.transformers.sampling import Draw, Sampling
from radix.integrations.transformers.scheduler import Scheduler
from radix.integrations.transformers.text import end_tokens
from seqattn.counts import positive
from seqattn.errors import BadValueError, SeqAttnError

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Callable,
        Generator,
        Iterator,
        Sequence,
    )

    from typing_extensions import Self, Unpack

    from radix.integrations.transformers.decoding import GraphSizes
    from radix.integrations.transformers.flight import Landed
    from radix.integrations.transformers.model import Model, ModelShape
    from radix.integrations.transformers.text import Prompt, Tokenizer
    from seqattn.hybrid import CostModel

__all__ = ["Engine"]


class Engine:
    """Serves a transformers model from a prefix cache: continuous batching over shared pages.

        engine = Engine(model, tokenizer, PrefixCache(manager_for(model, num_pages=4096)))
        answers = engine.generate(["Once upon a time", "Once upon a hill"], max_new_tokens=32)
        for piece in engine.stream([{"role": "user", "content": "Hello!"}]):
            print(piece.text, end="")

    Any thread may call any method. One step runs at a time; `submit` never waits for it, `cancel` and `fork` do.
    The model belongs to the engine until `close`. The cache may be shared with others (sessions, pins), and with other
    engines of the same model with a `name` of their own, as long as their steps do not overlap.

    Args:
        model: a causal language model of transformers, in eval mode, on one device.
        tokenizer: its tokenizer; None to deal in token ids only.
        cache: over a manager that fits the model, as `manager_for` makes it.
        max_requests: that run at a time; more wait.
        max_tokens_per_step: rows of one forward; at least `max_requests`. Long prompts are computed in chunks.
        backend: of `PagedAttention`: "auto", "flashinfer" or "torch".
        packing: "hybrid" reads what requests share once a step, where that pays; "plain" reads it for each.
        cost_model: which shared runs pay; "auto" is the attention's own on CUDA, and every run elsewhere (None).
        graph_sizes: how decoding is captured in CUDA graphs; of no effect on the CPU.
            "auto": a batch size when it has been decoded for some steps. A model that cannot be captured, as its code
            looks at values, goes on without, and one logged line says why; its attention still runs in graphs.
            Batch sizes, (1, 8, 64) say: these, as they come; a batch is padded to the next one. A model that cannot be
            captured raises `CaptureError`.
            (): only the attention of each layer. None: nothing; where other threads use the device at the same time, or
            kernels launch on CUDA's legacy stream instead of torch's, which a capture does not see.
        run_ahead: launch a decode step before the tokens of the one before are read; None: on CUDA. A request that is
            ended by what it says has then computed a token more, for nothing; a new one may join a step later, and a
            token is handed over when the step after it is launched.
        name: requests without an id get the ids "NAME 0", "NAME 1", …
        clock: seconds, for the figures of requests.

    Attributes:
        cache, tokenizer, model: as given.
        shape: the `ModelShape`.
        on_short: called, one after the other, while nothing runs and no pages are left for who waits first. Each lets
            go of something and says whether it did; `sessions_for` adds that closed sessions end before their time.
        steps: launches and lands them; what is on its way, and whether steps are launched ahead.
        end_tokens: what ends an answer by default: the end tokens of the model's generation config.

    Raises:
        ModelError: a model that cannot be served, with the reason.
        TensorError: a cache that does not fit it.
        BadValueError: a number or a name out of range, or a model in training mode.
        MissingExtraError: transformers is not installed.

    Cost: a forward of two tokens.
    """

    def __init__(  # noqa: PLR0913  three parts, and options that are keywords
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        cache: PrefixCache,
        *,
        max_requests: int = 64,
        max_tokens_per_step: int = 2048,
        backend: str = "auto",
        packing: Packing = "hybrid",
        cost_model: CostModel | Literal["auto"] | None = "auto",
        graph_sizes: GraphSizes = "auto",
        run_ahead: bool | None = None,
        name: str = "request",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        most = positive("max_requests", max_requests)
        budget = positive("max_tokens_per_step", max_tokens_per_step)
        if budget < most:
            raise BadValueError(f"max_tokens_per_step {budget} is below max_requests {most}: each needs a token a step")
        runner = Runner(
            model,
            cache,
            backend=backend,
            packing=packing,
            cost_model=cost_model,
            graph_sizes=graph_sizes,
            max_requests=most,
        )
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.shape: ModelShape = runner.shape
        self.end_tokens = end_tokens(model, tokenizer)
        self.clock = clock
        self.on_short: list[Callable[[], bool]] = []
        self.scheduler = Scheduler(cache, most, budget, self.on_short)
        if run_ahead not in (None, True, False):
            raise BadValueError(f"run_ahead must be True, False, or None for True on CUDA, not {run_ahead!r}")
        ahead = self.shape.device.type == "cuda" if run_ahead is None else run_ahead
        self.steps = Steps(runner, self.scheduler, clock, run_ahead=ahead)
        self._lock = threading.RLock()
        self._is_torn = False
        self._requests = OpenRequests(name)

    @classmethod
    def for_model(
        cls, model: Model, tokenizer: Tokenizer | None = None, *, num_pages: int, page_size: int = 16
    ) -> Self:
        """An engine over a new cache of so many pages; `manager_for` says what one takes."""
        return cls(model, tokenizer, PrefixCache(manager_for(model, num_pages=num_pages, page_size=page_size)))

    # -- asking -------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, **options: Unpack[Options]) -> Request:
        """Queues a prompt; `step` and all that call it compute it. Waits for nothing; an interrupt queues nothing.

        Args:
            prompt: token ids (list, array or tensor); a text; or messages (`[{"role": …, "content": …}, …]`), which
                the tokenizer's chat template turns into a text.
            max_new_tokens: tokens of the answer at most; 256 by default.
            sampling: greedy by default.
            stop_tokens: end after any of these, which is then the last token; None for `end_tokens`, () for none.
            stop_texts: end before any of these in the text, which is cut there (the tokens are not).
            namespace: share only with what was cached under the same value.
            request_id: its id in the cache; None for one of the engine's.

        Raises:
            TokenError: no tokens, or not tokens of this model.
            LengthError: the answer could outgrow the model's positions.
            PromptTooLargeError: it could outgrow the whole cache.
            BadValueError: a text or stop text without a tokenizer, an empty stop text, or an option of a wrong type.
            DuplicateSequenceError: `request_id` is running, or waits to.
        """
        return self._enter(request_for(self, prompt, **options))

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> list[Request]:
        """Submits prompts, and steps until all are finished; `options` are those of `submit`, for each.

        Raises:
            What `submit` and `step` raise; none of the prompts is computed any further then.
        """
        if isinstance(prompts, str):
            raise BadValueError(f"prompts must be a list of prompts, not the text {prompts[:40]!r}: put it into a list")
        requests: list[Request] = []
        try:
            requests.extend(self.submit(prompt, **options) for prompt in prompts)
            return self.wait(requests)
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise

    def wait(self, requests: Sequence[Request]) -> list[Request]:
        """Steps until these requests are finished, and returns them."""
        for request in requests:
            while not request.is_finished:
                self._advance(request, len(request.tokens))
        return list(requests)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Piece, None, None]:
        """Submits a prompt, and yields what each step adds; leaving the loop cancels it. Others step along.

        What is no request is refused by this call. The prompt is queued when the first piece is asked for, so that a
        stream that nobody reads leaves nothing behind; a `request_id` that is taken is refused then.

        Raises:
            What `submit` raises.
        """
        return self._stream(request_for(self, prompt, **options))

    def _stream(self, request: Request) -> Generator[Piece, None, None]:
        try:
            self._enter(request)
            yield from self.follow(request)
        finally:
            self._drop(request)

    def follow(self, request: Request) -> Iterator[Piece]:
        """Yields what a submitted request has, then what each step adds, until it is finished."""
        reader = Reader(request)
        while not reader.is_done:
            self._advance(request, reader.num_seen)
            yield from reader.read()

    def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """`stream` for `async for`: steps run in a thread, so that the loop goes on; one step serves all who wait.

        An `async for` that is left early closes its generator some time later; `contextlib.aclosing` does it at once.

        Raises:
            What `submit` raises, when `stream` does.
        """
        return self._astream(request_for(self, prompt, **options))

    async def _astream(self, request: Request) -> AsyncGenerator[Piece, None]:
        try:
            self._enter(request)
            async for piece in self.afollow(request):
                yield piece
        finally:
            # A task may be cancelled again and again: the request ends all the same.
            await surely(self._drop, request)

    async def afollow(self, request: Request) -> AsyncIterator[Piece]:
        """`follow` for `async for`."""
        reader = Reader(request)
        while not reader.is_done:
            await asyncio.to_thread(self._advance, request, reader.num_seen)
            for piece in reader.read():
                yield piece

    # -- stepping -----------------------------------------------------------------------------------------------------

    @property
    def runner(self) -> Runner:
        """The model, and how its steps are computed; that of `steps`."""
        return self.steps.runner

    @property
    def num_waiting(self) -> int:
        """Requests that are not running yet, or not again."""
        return len(self.scheduler.inbox) + len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self.scheduler.running)

    def step(self) -> list[Request]:
        """One forward of everything that runs, chunks of prompts included; with `run_ahead` the next is on its way.

        Returns:
            The requests that got a token, finished ones included; empty if none did.

        Raises:
            NoPageError: nothing runs, and pins or others hold the pages that each of the first requests needs. Nothing
                is lost: step again when they let go.
            Whatever the model raises: requests stand where they stood; what is on its way is computed again.
            Whatever the tokenizer raises of a request with stop texts, when all else is done.

        Cost: the model's forward, and on the host O(rows + pages + requests).
        """
        with self._lock:
            self._mend()
            with self._torn():
                return self._accept(self.steps.next())

    def cancel(self, request: Request) -> None:
        """Ends a request now; what it has computed is published. Nothing happens if it is finished.

        Raises:
            SeqAttnError: it is another engine's.
        """
        with self._lock:
            if not request.is_finished:
                self._requests.refuse_foreign(request)
                with self._torn():
                    request.finish_reason = "cancelled"
                    self._end(request, self.clock())
            elif request in self.scheduler.running:  # an interrupt came before
                self._end(request, self.clock())

    def fork(self, request: Request, *, sampling: Sampling) -> Request:
        """Another answer to the same prompt, from where a request stands: its tokens so far are shared.

        Before its first token that means from the first token on (best of n). Full pages are shared, the partly filled
        one is copied. Where no page is free for that, the fork waits like a new request.

        Raises:
            SeqAttnError: the request is finished, or another engine's.
            BadValueError: `sampling` is no `Sampling`.
        """
        with self._lock:
            self._mend()
            if request.is_finished:
                raise SeqAttnError(f"{request.id!r} is finished and cannot be forked: submit its tokens anew")
            self._requests.refuse_foreign(request)
            number, free_id = self._requests.next_id()
            child = request.copy(free_id, Draw(sampling, len(request.tokens)), self.clock(), number)
            self.cache.descriptor.refuse_running(child.id)
            with self._torn():
                if self.steps.has(request):  # its sequence has a token that it has not
                    self.steps.drop()
                self._requests.enter(child)
                if not request.tokens:
                    request.forks.append(child)
                elif request in self.scheduler.running and not request.is_prefilling:
                    self.scheduler.fork(request, child)
                else:
                    child.todo = child.all_tokens
                    self.scheduler.inbox.append(child)
            return child

    def close(self) -> None:
        """Cancels everything, and gives the model the attention that it had before."""
        with self._lock:
            self._mend()
            scheduler = self.scheduler
            while scheduler.inbox or scheduler.waiting or scheduler.running:
                for request in (*scheduler.inbox, *scheduler.waiting, *scheduler.running):
                    self.cancel(request)
            self.steps.drop()
            self.runner.close()

    def __enter__(self) -> Self:
        """Itself; `close` when the block is left."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _enter(self, request: Request) -> Request:
        """Queues what was checked, under its id or one of the engine's; what raises, an interrupt too, undoes it."""
        request.submitted_at = self.clock()
        request.arrival, free_id = self._requests.next_id()
        request.id = free_id if request.id is None else request.id
        self.cache.descriptor.refuse_running(request.id)
        try:
            self._requests.enter(request)
            self.scheduler.inbox.append(request)
            return request
        except BaseException:
            self._drop(request)
            raise

    def _drop(self, request: Request) -> None:
        """Cancels a request, if it is one of the engine's that has not ended."""
        if self._requests.has(request):
            self.cancel(request)

    def _advance(self, request: Request, num_seen: int) -> None:
        """Steps once, unless the request has more tokens than the caller has seen, or is finished."""
        with self._lock:
            if len(request.tokens) > num_seen or request.is_finished:
                return
            self._requests.refuse_foreign(request)
            self.step()

    def _accept(self, landed: Landed) -> list[Request]:
        """Reads new tokens as text, starts forks, and ends what is finished; returns the requests that got one."""
        requests = [request for family in landed.families for request in family]
        errors: list[Exception] = []
        for request in requests:
            try:
                request.read()
            except Exception as error:  # noqa: PERF203  a tokenizer is a program: it may raise anything
                errors.append(error)
        for first, *forks in landed.families:
            for request in (first, *forks):
                request.forks = []
            for fork in forks:
                if not fork.is_finished:
                    self.scheduler.fork(first, fork)
        for request in requests:
            if request.is_finished:
                self._end(request, landed.now)
        if errors:
            raise errors[0]
        return requests

    @contextmanager
    def _torn(self) -> Iterator[None]:
        """What does not come to its end inside, for an error or an interrupt, is for `_mend`."""
        before, self._is_torn = self._is_torn, True
        yield
        self._is_torn = before

    def _mend(self) -> None:
        """After what did not come to its end: every open request is in its place again."""
        if self._is_torn:
            self.steps.drop()
            for request in self._requests.gather(self.scheduler):
                try:
                    request.read()
                finally:  # a tokenizer that raises is not asked again
                    self._end(request, self.clock())
            self._is_torn = False

    def _end(self, request: Request, now: float) -> None:
        request.finished_at = now
        self.scheduler.end(request)
        self._requests.leave(request)
        self.steps.forget_finished()
