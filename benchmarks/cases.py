"""What is run, and what is promised of it.

`GROUPS` lists the runs: implementations in one group get the same work, one directly after the other. `CLAIMS` are the
rows of the table: a figure of ours, the figure it is compared with, and the floor that it must reach.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["CLAIMS", "GROUPS", "Claim", "Figure", "Group"]

Options = dict[str, Any]

OURS, WHOLE, HISTORY, RUST, CLASSIC, VLLM, OLD = (
    "ours",
    "ours-whole-pages",
    "ours-history",
    "sglang-rust",
    "sglang-classic",
    "vllm",
    "seqattn-0.0.2",
)
LENGTHS = (1024, 8192, 32_768, 131_072)
MILLION = 1_000_000


class Group(NamedTuple):
    """The same work for several implementations.

    Attributes:
        script: which benchmark.
        options: its sizes.
        impls: who does the work, in this order; in every other round in the opposite order.
        keeps: building takes so long that one process serves all rounds.
        fresh: each run in a process that has done nothing else, and one run is enough.
    """

    script: str
    options: Options
    impls: tuple[str, ...]
    keeps: bool = False
    fresh: bool = False


GROUPS = (
    *(Group("match", {"tokens": n}, (OURS, RUST, CLASSIC, VLLM)) for n in LENGTHS),
    Group("match", {"tokens": LENGTHS[-1], "shape": "chunks"}, (OURS, RUST, CLASSIC)),
    Group("match", {"tokens": LENGTHS[-1], "shape": "branches"}, (OURS, RUST, CLASSIC)),
    *(Group("insert", {"tokens": n}, (OURS, RUST, CLASSIC, VLLM)) for n in LENGTHS),
    Group("turn", {"page_size": 16}, (OURS, WHOLE, HISTORY, RUST, CLASSIC, VLLM)),
    Group("turn", {"page_size": 64}, (OURS, WHOLE, RUST)),
    Group("turn", {"page_size": 1}, (WHOLE, RUST)),
    Group("anatomy", {}, (OURS, WHOLE)),
    Group("anatomy", {"scale": 0.1}, (OURS, WHOLE)),
    Group("deep", {"shape": "chat"}, (OURS, RUST, CLASSIC, VLLM)),
    Group("deep", {"shape": "branches"}, (OURS, RUST, CLASSIC)),
    Group("evict", {"leaves": 10_000}, (OURS, HISTORY, RUST, CLASSIC, VLLM)),
    Group("evict", {"leaves": 100_000}, (OURS, RUST, CLASSIC, VLLM), keeps=True),
    Group("evict", {"leaves": MILLION}, (OURS, RUST, VLLM), keeps=True),
    *(Group("allocate", {"pages": n}, (OURS, OLD)) for n in (128, 1024, 8192, 65_536)),
    *(Group("pack", {"batch": n}, (OURS, OLD)) for n in (1, 16, 64, 256)),
    *(Group("pack", {"batch": 64, "pages": n}, (OURS, OLD)) for n in (32, 128, 512)),
    Group("memory", {"leaves": 100_000, "tokens": 16}, (OURS, RUST, CLASSIC, VLLM), fresh=True),
    Group("memory", {"leaves": 1000, "tokens": 4096}, (OURS, RUST, CLASSIC, VLLM), fresh=True),
    Group("memory", {"leaves": 100, "tokens": 16_000}, (OURS, RUST, CLASSIC, VLLM), fresh=True),
    *(Group("tokens", {"tokens": n}, (OURS,)) for n in LENGTHS),
    Group("copies", {"slots": 8}, (OURS,)),
    Group("attention", {}, (OURS,)),
)


class Figure(NamedTuple):
    """One number of each round: which run, which of its measures, which statistic of it."""

    script: str
    impl: str
    options: Options
    measure: str
    statistic: str = "median"


class Claim(NamedTuple):
    """A row of the table.

    Attributes:
        what: the work, in words.
        ours: our figure.
        peer: what it is compared with; None if the figure speaks for itself.
        at_least: the floor of peer / ours.
        at_most: the ceiling of ours / peer, or of ours alone.
    """

    what: str
    ours: Figure
    peer: Figure | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def unit(self) -> str:
        """As in the rows: B or us."""
        return "B" if self.ours.measure.startswith("bytes") else "us"


def _against(peer: str, what: str, script: str, measure: str, floor: float | None, **options: Any) -> Claim:  # noqa: ANN401
    """The same measure on both sides."""
    return Claim(what, Figure(script, OURS, options, measure), Figure(script, peer, options, measure), floor)


def _turn(what: str, impl: str, peer: str, page_size: int, floor: float | None, measure: str = "turn") -> Claim:
    """Means, not medians: a turn that evicts much is part of the price."""
    options = {"page_size": page_size}
    ours = Figure("turn", impl, options, "turn", "mean")
    return Claim(f"chat turn, page {page_size}, {what}", ours, Figure("turn", peer, options, measure, "mean"), floor)


def _within(what: str, script: str, measure: str, other: str, limit: float, **options: Any) -> Claim:  # noqa: ANN401
    """Ours at most so many times another figure of ours from the same run."""
    ours, reference = (Figure(script, OURS, options, name) for name in (measure, other))
    return Claim(what, ours, reference, at_most=limit)


def _bytes(
    what: str, measure: str, limit: float, *, script: str = "memory", peer: str | None = None, **options: int
) -> Claim:
    """Bytes, which speak for themselves."""
    figures = [Figure(script, impl, options, measure) for impl in (OURS, peer) if impl]
    return Claim(what, figures[0], figures[1] if peer else None, at_most=limit)


def _evictions(leaves: int, name: str) -> list[Claim]:
    """What vLLM's list of blocks is good at."""
    floors = {
        "extension": "a running sequence gets a page",
        "allocation": "a one-page prompt is looked up, gets a page",
        "request": "a one-page request, arrival to cached",
    }
    found = [
        _against(VLLM, f"{what}, one of {name} evicted", "evict", m, 1.5, leaves=leaves) for m, what in floors.items()
    ]
    noted = [
        Claim(
            f"{what}, one of {name} evicted, with a history",
            Figure("evict", HISTORY, {"leaves": leaves}, m),
            Figure("evict", VLLM, {"leaves": leaves}, m),
            1.5,
        )
        for m, what in floors.items()
        if any(HISTORY in group.impls for group in GROUPS if group.options == {"leaves": leaves})
    ]
    return [*found, *noted, _against(VLLM, f"`evict(1)` alone, {name} leaves", "evict", "evict", None, leaves=leaves)]


CLAIMS = (
    *(
        _against(RUST, f"match, {n // 1024}k tokens", "match", "match", floor, tokens=n)
        for n, floor in zip(LENGTHS, (2, 3, 4, 4), strict=True)
    ),
    _against(RUST, "match, 128k in chunks of 4,096", "match", "match", 3, tokens=LENGTHS[-1], shape="chunks"),
    _against(RUST, "match, 128k, branches every 4,096", "match", "match", None, tokens=LENGTHS[-1], shape="branches"),
    *(
        _against(RUST, f"insert, {n // 1024}k tokens", "insert", "insert", floor, tokens=n)
        for n, floor in zip(LENGTHS, (2, None, None, 5), strict=True)
    ),
    _turn("whole pages", WHOLE, RUST, 16, 3),
    _turn("whole pages", WHOLE, RUST, 64, 3),
    _turn("tails", OURS, RUST, 16, 2.5),
    _turn("tails", OURS, RUST, 64, 2.5),
    _turn("whole pages", WHOLE, RUST, 1, 1.3),
    _turn("whole pages, slots for free", WHOLE, RUST, 16, None, "turn, tree"),
    _turn("tails, slots for free", OURS, RUST, 16, None, "turn, tree"),
    _turn("tails, with a history of evictions", HISTORY, RUST, 16, None),
    _against(RUST, "`evict(1)`, 10k idle leaves", "evict", "evict", 15, leaves=10_000),
    _against(RUST, "`evict(1)`, 100k idle leaves", "evict", "evict", None, leaves=100_000),
    _against(RUST, "`evict(1)`, 1M idle leaves", "evict", "evict", 10_000, leaves=MILLION),
    Claim(
        "`evict(1)`, 1M leaves over 10k leaves",
        Figure("evict", OURS, {"leaves": MILLION}, "evict"),
        Figure("evict", OURS, {"leaves": 10_000}, "evict"),
        at_most=1.5,
    ),
    _against(RUST, "64 turns deep: hold and release", "deep", "hold and release", 2, shape="chat"),
    _against(RUST, "64 turns deep, each reply given twice", "deep", "hold and release", None, shape="branches"),
    _against(OLD, "pack 256 sequences of 2,048 pages", "pack", "pack", 150, batch=256),
    _within("pack over one `np.concatenate`", "pack", "pack", "concatenate", 1.3, batch=256),
    _within("pack again over pack: no table changed", "pack", "again, same tables", "pack", 0.1, batch=256),
    _within("pack again over pack: 1 table in 16 grew", "pack", "again, tables grown", "pack", 0.1, batch=256),
    _against(OLD, "allocate and release 8,192 pages", "allocate", "allocate and release", 50, pages=8192),
    _bytes("memory a leaf of 16 tokens", "bytes a leaf", 700, peer=RUST, leaves=100_000, tokens=16),
    _bytes("memory a token, leaves of 4,096", "bytes a token", 6, peer=RUST, leaves=1000, tokens=4096),
    _bytes("memory a page of 16, long prompts", "bytes a page", 100, peer=VLLM, leaves=100, tokens=16_000),
    _turn("tails", OURS, VLLM, 16, 8),
    _against(VLLM, "match, 32k tokens", "match", "match", 100, tokens=LENGTHS[2]),
    _against(VLLM, "match, 128k tokens", "match", "match", 100, tokens=LENGTHS[3]),
    *_evictions(10_000, "10k"),
    *_evictions(MILLION, "1M"),
    _bytes("bytes beyond the key, numpy int32", "bytes beyond the key", 4096, script="tokens", tokens=LENGTHS[2]),
)
