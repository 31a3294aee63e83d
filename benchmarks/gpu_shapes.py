"""Batches that the GPU benchmark computes: the shapes of the design and some drawn from a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from seqattn.calibrate import PAGE_SIZE, Shape

__all__ = [
    "KNOWN",
    "LONG",
    "MIXED",
    "PAGE_SIZE",
    "RAGGED",
    "UNEVEN",
    "Shape",
    "one_prefix",
    "random_shapes",
    "scattered",
    "tables_of",
]

#: what names of choices begin with whose levels have long lists of single sequences
LONG = "long "
#: tokens of KV in one layer that a random shape has at most: 1 GiB with 8 KV heads of 128 elements in 16 bits
_MOST_TOKENS = 1 << 18


def one_prefix(batch: int, shared: int, own: int) -> Shape:
    """So many sequences on one prompt of so many tokens, each with so many of its own."""
    return Shape(batch, 1, shared, 1, 0, own)


#: one shared prefix: (batch, shared, own tokens); forests: systems, tokens, documents of each, tokens, own tokens
KNOWN = [
    one_prefix(256, 8192, 512),
    one_prefix(256, 32768, 256),
    one_prefix(128, 16384, 256),
    one_prefix(512, 4096, 256),
    one_prefix(64, 32768, 1024),
    one_prefix(64, 8192, 512),
    one_prefix(64, 512, 2048),
    one_prefix(16, 1024, 256),
    one_prefix(8, 2048, 2048),
    one_prefix(64, 0, 2048),
    one_prefix(4, 8192, 128),
    Shape(128, 2, 8192, 8, 8192, 512),
    Shape(256, 1, 16384, 32, 2048, 128),
    Shape(128, 4, 2048, 4, 4096, 256),
    Shape(256, 8, 4096, 4, 256, 1024),
    Shape(128, 1, 1024, 16, 512, 512),
]

#: shapes whose sequences have between a quarter of their own tokens and twice as many
RAGGED = [
    one_prefix(256, 8192, 512),
    one_prefix(64, 2048, 2048),
    one_prefix(128, 512, 1024),
    one_prefix(32, 16384, 512),
    one_prefix(64, 0, 1024),
    one_prefix(256, 256, 256),
    Shape(128, 1, 4096, 16, 1024, 512),
    Shape(256, 4, 2048, 8, 512, 256),
]


#: shapes whose documents are of different lengths, and asked by few sequences or by many
UNEVEN = [
    Shape(256, 1, 2048, 16, 4096, 256),
    Shape(128, 1, 8192, 32, 1024, 512),
    Shape(256, 2, 4096, 8, 2048, 128),
    Shape(64, 1, 512, 8, 8192, 512),
    Shape(128, 4, 1024, 4, 2048, 256),
    Shape(256, 1, 16384, 64, 512, 256),
    Shape(32, 1, 4096, 4, 4096, 1024),
    Shape(512, 1, 1024, 32, 2048, 128),
]


#: shapes whose sequences have own tokens of log-normal lengths, as conversations of users have: a few are very long
MIXED = [
    one_prefix(32, 0, 4096),
    one_prefix(64, 0, 2048),
    one_prefix(128, 0, 1536),
    one_prefix(256, 0, 768),
    one_prefix(512, 0, 384),
    one_prefix(64, 4096, 1024),
    one_prefix(256, 8192, 512),
    Shape(128, 1, 2048, 16, 512, 512),
    Shape(64, 4, 2048, 2, 512, 1024),
]


def random_shapes(count: int, seed: int) -> list[Shape]:
    """Shapes with sizes spread evenly over their orders of magnitude, a half of them forests."""
    rng = np.random.default_rng(seed)

    def size(low: int, high: int) -> int:
        return int(np.exp(rng.uniform(np.log(low), np.log(high)))) // PAGE_SIZE * PAGE_SIZE

    shapes: list[Shape] = []
    while len(shapes) < count:
        batch, own = int(rng.choice([8, 16, 32, 64, 128, 256, 512])), size(64, 4096)
        if len(shapes) % 2:
            systems, documents = int(2 ** rng.integers(0, 3)), int(2 ** rng.integers(1, 6))
            shape = Shape(batch, systems, size(128, 32768), documents, size(128, 16384), own)
        else:
            shape = one_prefix(batch, size(64, 65536), own)
        num_prompts = shape.systems * shape.documents
        tokens = shape.systems * shape.system_len + num_prompts * shape.document_len + batch * own
        if tokens <= _MOST_TOKENS and 2 * num_prompts <= batch:
            shapes.append(shape)
    return shapes


def tables_of(
    shape: Shape,
    seed: int,
    *,
    in_line: bool = False,
    ragged: bool = False,
    uneven: bool = False,
    mixed: bool = False,
) -> list[npt.NDArray[np.int32]]:
    """Page tables of a shape, neighbours sharing the most; pages in random places.

    Args:
        shape: the shape.
        seed: of the random numbers.
        in_line: prompts and documents lie side by side in memory, as a fresh allocator hands pages out.
        ragged: sequences have between a quarter of the own tokens and twice as many.
        uneven: so are they, and documents have between a quarter of their tokens and twice as many; the n-th is asked
            by sequences in proportion to 1 / n.
        mixed: own tokens are log-normal, with the shape's number as their median and a deviation of their log of 1.
    """
    if uneven:
        return _uneven_tables(shape, seed, in_line=in_line)
    if mixed:
        return _mixed_tables(shape, seed, in_line=in_line)
    pages_each = [shape.system_len // PAGE_SIZE, shape.document_len // PAGE_SIZE, shape.own_len // PAGE_SIZE]
    num_prompts = shape.systems * shape.documents
    total = shape.systems * pages_each[0] + num_prompts * pages_each[1] + shape.batch * pages_each[2]
    rng = np.random.default_rng(seed)
    pages = rng.permutation(total).astype(np.int32)
    sizes = [shape.systems, num_prompts, shape.batch]
    if ragged:
        pages = rng.permutation(total + shape.batch * pages_each[2]).astype(np.int32)
        pages_each[2] *= 2
    if in_line:
        first_own = len(pages) - sizes[2] * pages_each[2]
        pages = np.concatenate((np.arange(first_own), first_own + np.argsort(pages[first_own:]))).astype(np.int32)
    ends = np.cumsum([count * each for count, each in zip(sizes, pages_each, strict=True)])
    parts = [
        part.reshape(count, each)
        for part, count, each in zip(np.split(pages, ends[:-1]), sizes, pages_each, strict=True)
    ]
    rows = np.arange(shape.batch)
    prompts = rows * num_prompts // shape.batch
    chosen = (prompts // shape.documents, prompts, rows)
    whole = np.ascontiguousarray(np.concatenate([part[i] for part, i in zip(parts, chosen, strict=True)], axis=1))
    if not ragged:
        return list(whole)
    fewest = -(-pages_each[2] // 8)
    left_out = rng.integers(0, pages_each[2] - fewest + 1, shape.batch)
    return [table[: len(table) - n] for table, n in zip(whole, left_out.tolist(), strict=True)]


def _uneven_tables(shape: Shape, seed: int, *, in_line: bool) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(seed)

    def pages_of(num_tokens: int, count: int) -> list[int]:
        fewest, most = -(-num_tokens // (4 * PAGE_SIZE)), 2 * num_tokens // PAGE_SIZE
        return [int(number) for number in rng.integers(fewest, most + 1, count)]

    document_pages = pages_of(shape.document_len, shape.systems * shape.documents)
    own_pages = pages_of(shape.own_len, shape.batch)
    shares = np.tile(1 / np.arange(1, shape.documents + 1), shape.systems)
    documents = np.sort(rng.choice(len(shares), shape.batch, p=shares / shares.sum())).tolist()
    return _joined(shape, rng, documents, document_pages, own_pages, in_line=in_line)


def _mixed_tables(shape: Shape, seed: int, *, in_line: bool) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    own_pages = np.ceil(rng.lognormal(np.log(shape.own_len), 1, shape.batch) / PAGE_SIZE).astype(int).tolist()
    num_prompts = shape.systems * shape.documents
    documents = (np.arange(shape.batch) * num_prompts // shape.batch).tolist()
    document_pages = [shape.document_len // PAGE_SIZE] * num_prompts
    return _joined(shape, rng, documents, document_pages, own_pages, in_line=in_line)


def _joined(
    shape: Shape,
    rng: np.random.Generator,
    documents: list[int],
    document_pages: list[int],
    own_pages: list[int],
    *,
    in_line: bool,
) -> list[npt.NDArray[np.int32]]:
    """Tables of sequences by their documents, from how many pages each document and each sequence has."""
    system_pages = [shape.system_len // PAGE_SIZE] * shape.systems
    sizes = [*system_pages, *document_pages, *own_pages]
    first_own = sum(sizes) - sum(own_pages)
    pages = np.arange(sum(sizes), dtype=np.int32)
    rng.shuffle(pages[first_own if in_line else 0 :])
    parts = np.split(pages, np.cumsum(sizes)[:-1])
    own = parts[-shape.batch :]
    return [
        np.concatenate((parts[document // shape.documents], parts[shape.systems + document], own[i]))
        for i, document in enumerate(documents)
    ]


def scattered(tables: list[npt.NDArray[np.int32]], seed: int) -> list[npt.NDArray[np.int32]]:
    """The same tables with all pages in other, random places."""
    places = np.random.default_rng(seed).permutation(1 + max(int(table.max()) for table in tables)).astype(np.int32)
    return [places[table] for table in tables]
