"""A million random steps: lives of an allocator, a descriptor and a prefix cache, each against its model; then threads.

    python -m tests.soak [--steps 1000000] [--seed 0] [--seconds 30]

A life that fails is printed with its seed, that of a prefix cache shrunk; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests.radix import driver
from tests.radix.threads import run_threads
from tests.seqattn import test_descriptor_machine, test_page_lives

STEPS_PER_LIFE = 250


def soak(name: str, live: Callable[[int, int], Counter[str]], num_steps: int, first_seed: int) -> Counter[str]:
    """Lives from consecutive seeds until `num_steps` are made; prints how it goes."""
    began = shown = time.monotonic()
    made: Counter[str] = Counter()
    for index, done in enumerate(range(0, num_steps, STEPS_PER_LIFE)):
        try:
            made += live(first_seed + index, min(STEPS_PER_LIFE, num_steps - done))
        except Exception:
            print(f"FAILED: {name}, seed {first_seed + index}", flush=True)
            raise
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{name}: {done:,} of {num_steps:,} steps, {shown - began:.0f} s", flush=True)
    print(f"{name}: {num_steps:,} steps in {time.monotonic() - began:.0f} s: {dict(sorted(made.items()))}", flush=True)
    return made


def main() -> int:
    """Runs everything; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first life; each has the next one")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the threads run on each cache")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    try:
        soak("allocator", test_page_lives.random_life, args.steps // 5, args.seed)
        soak("descriptor", test_descriptor_machine.random_life, args.steps // 5, args.seed)
        soak("prefix cache", driver.random_life, args.steps - args.steps // 5 * 2, args.seed)
    except driver.LifeError as found:
        print(f"FAILED: {found}\n\nshrinking …", flush=True)
        print(f"shortest: {found.shrunk()}", flush=True)
        return 1
    for page_size in (1, 16):
        num_calls = run_threads(page_size, num_pages=120, seconds=args.seconds)
        print(f"eight threads, page size {page_size}: {num_calls:,} calls in {args.seconds:g} s, clean", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
