"""A wrapper's `run`, and its `plan`, without what they do anew at each call.

Between a wrapper's `run` and its kernel lie checks and some fifty arguments, of which only the queries, the layer's
keys and values and the results change from layer to layer:

    first layer    wrapper.run(q, (keys, values), ...) ──▶ kernel(buffers, plan, q, keys, values, ..., out, lse, ...)
                                                           noted: the function, its arguments, where the five stand
    other layers   the same function, the same arguments but for these five

What is noted is found by identity, so the order of arguments, which differs from version to version, does not matter. A
wrapper that calls its kernel in another way is run as it is, each time. Plans of a wrapper that decodes batches of one
size differ in two arrays on the CPU, and are repeated in the same way; where its arrays on the device are new with each
plan, it is told of them as `flashinfer.decode.fast_decode_plan` tells it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["BoundPlan", "BoundRun"]

#: where a wrapper keeps the functions of its compiled kernels
_MODULE = "_cached_module"


#: held while a module, which all wrappers of a kind share, has another function
_PATCHING = threading.Lock()


class BoundRun:
    """The runs of a planned wrapper, with results in given memory; valid until the wrapper is planned anew.

    Args:
        wrapper: planned.
        takes_two: its `run` takes keys and values as two arguments, not as one pair.
    """

    __slots__ = ("_arguments", "_function", "_places", "_takes_two", "wrapper")

    def __init__(self, wrapper: Any, *, takes_two: bool = False) -> None:  # noqa: ANN401  flashinfer's, untyped
        self.wrapper = wrapper
        self._takes_two = takes_two
        self._function: Callable[..., object] | None = None
        self._arguments: list[Any] = []
        self._places: tuple[int, ...] | None = None

    def __call__(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Computes one layer; every call with an `lse`, or every call without."""
        if self._function is None:
            self._first(q, caches, out, lse)
            return
        arguments = self._arguments.copy()
        assert self._places is not None
        for place, value in zip(self._places, (q, *caches, out, lse), strict=False):
            arguments[place] = value
        self._function(*arguments)

    def after(self, old: Sequence[object], new: Sequence[object]) -> BoundRun:
        """The runs of the plan after this one, which differ in these arguments alone; noted anew if they do not."""
        following = BoundRun(self.wrapper, takes_two=self._takes_two)
        if self._function is not None:
            arguments = self._arguments.copy()
            places = [[i for i, argument in enumerate(arguments) if argument is given] for given in old]
            if all(len(found) == 1 for found in places):
                for found, given in zip(places, new, strict=True):
                    arguments[found[0]] = given
                following._function, following._arguments, following._places = self._function, arguments, self._places
        return following

    def _first(self, q: torch.Tensor, caches: Any, out: torch.Tensor, lse: torch.Tensor | None) -> None:  # noqa: ANN401  as in __call__
        """Runs the wrapper and notes what it calls, unless an earlier run showed that this is of no use."""
        module = getattr(self.wrapper, _MODULE, None)
        recorder = _Recorder(module)
        if module is not None and self._places is None:
            setattr(self.wrapper, _MODULE, recorder)
        try:
            options = {} if lse is None else {"lse": lse, "return_lse": True}
            self.wrapper.run(q, *(caches if self._takes_two else (caches,)), out=out, **options)
        finally:
            if module is not None:
                setattr(self.wrapper, _MODULE, module)
        self._places = ()
        if len(recorder.calls) == 1:
            self._note(*recorder.calls[0], (q, *caches, out) if lse is None else (q, *caches, out, lse))

    def _note(self, function: Callable[..., object], arguments: tuple[Any, ...], changing: tuple[Any, ...]) -> None:
        """Keeps a call if each of the changing tensors stands in one place of it."""
        places = [[i for i, argument in enumerate(arguments) if argument is tensor] for tensor in changing]
        if all(len(found) == 1 for found in places):
            self._function, self._arguments = function, list(arguments)
            self._places = tuple(found[0] for found in places)
            for place in self._places:
                self._arguments[place] = None


class BoundPlan:
    """The plans of a wrapper that decodes batches of one size; their arrays on the device are the caller's to write.

    Args:
        wrapper: planned once for as many sequences.
        change: makes other arguments of those of the kernel's plan. All plans without the wrapper are given these, and
            so is the one that they repeat; if it cannot be repeated, the wrapper plans once more, and from then on.
    """

    __slots__ = ("_arguments", "_change", "_function", "_is_noted", "_places", "_wrapper")

    def __init__(self, wrapper: Any, change: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None) -> None:  # noqa: ANN401  flashinfer's, untyped
        self._wrapper, self._change = wrapper, change
        self._function: Callable[..., object] | None = None
        self._arguments: list[Any] = []
        self._places: list[list[int]] = []
        self._is_noted = False

    @property
    def is_repeated(self) -> bool:
        """Whether the next plan is made without the wrapper."""
        return self._function is not None

    def __call__(self, plan: Callable[[], object], indptr: torch.Tensor, lengths: torch.Tensor) -> object:
        """Plans; the first time by the wrapper, and again only if the call that it comes to cannot be repeated.

        Args:
            plan: makes the wrapper's plan.
            indptr: what it gives it for the offsets of pages, int32 on the CPU.
            lengths: likewise for the tokens of each sequence (`seq_lens`).

        Returns:
            The schedule if the plan was made without the wrapper, else None.

        Raises:
            What the plan raises, which one with changed arguments may where the wrapper's own would not.
        """
        if self._function is not None:
            arguments = self._arguments.copy()
            for places, given in zip(self._places, (indptr, lengths), strict=True):
                for place in places:
                    arguments[place] = given
            return self._function(*arguments)
        module = getattr(self._wrapper, _MODULE, None)
        if self._is_noted or not callable(getattr(module, "plan", None)):  # it may be loaded by this plan
            plan()
        else:
            self._is_noted = True
            self._note(module, plan, indptr, lengths)
            if self._change is not None and self._function is None:
                plan()
        return None

    def forget(self) -> None:
        """Leaves every plan to the wrapper from now on; not where plans are changed, as a graph may hold one."""
        assert self._change is None
        self._is_noted, self._function, self._arguments = True, None, []

    def _note(self, module: Any, plan: Callable[[], object], indptr: torch.Tensor, lengths: torch.Tensor) -> None:  # noqa: ANN401  as above
        recorder = _Recorder(module, self._change)
        with _PATCHING:
            function = module.plan
            try:
                module.plan = recorder.plan
                plan()
            finally:
                module.plan = function
        if len(recorder.calls) != 1:
            return
        arguments = list(recorder.calls[0][1])
        places = [[i for i, given in enumerate(arguments) if given is tensor] for tensor in (indptr, lengths)]
        # Not every kernel is told the lengths; one that is told them by another tensor would be told old ones.
        if len(places[0]) == 1 and (len(places[1]) == 1 or not any(_equals(given, lengths) for given in arguments)):
            for place in (*places[0], *places[1]):
                arguments[place] = None
            self._function, self._arguments, self._places = function, arguments, places


def _equals(given: object, lengths: torch.Tensor) -> bool:
    """Whether an argument has the values of `lengths`, whatever its type and place."""
    if not isinstance(given, torch.Tensor) or given.shape != lengths.shape:
        return False
    return torch.equal(given.to(lengths), lengths)


class _Recorder:
    """Stands for a module, and notes this thread's calls of its functions by position.

    Those by name cannot be repeated so. Other threads may plan with the same module meanwhile.
    """

    def __init__(self, module: Any, change: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None) -> None:  # noqa: ANN401  flashinfer's, untyped
        self._module, self._thread, self._change = module, threading.get_ident(), change
        self.calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  as above
        found = getattr(self._module, name)
        if not callable(found):
            return found

        def noted(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401  as above
            if threading.get_ident() == self._thread:
                arguments = arguments if self._change is None else self._change(arguments)
                self.calls += [(found, arguments)] * (2 if named else 1)  # more than one call is of no use
            return found(*arguments, **named)

        return noted
