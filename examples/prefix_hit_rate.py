"""How much of a chat is computed twice? Hit rates of a prefix cache by page size and capacity, with tails and without.

The chat is made up but seeded: a few system prompts shared by many, turns that grow, some forks. Engines share whole
pages only; token-exact tails also reuse the page in which two prompts part ways. The capacity is in tokens.

    python examples/prefix_hit_rate.py                          a table, and a picture in prefix_hit_rate.png
    python examples/prefix_hit_rate.py --trace trace.jsonl.gz   a recorded trace instead (prompts only)
"""

import argparse

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from radix import PrefixCache
from radix.replay import ChatWorkload, count_full_pages, read_trace, replay, replay_chat
from seqattn import PageAllocator

Rates = dict[int, dict[float, tuple[float, float]]]  # page size → capacity → hit rate of whole pages, and with tails


def measure(args: argparse.Namespace) -> Rates:
    """Serves everything once for each page size, capacity and kind of reuse."""
    sizes, shares = ((16, 256), (0.05, 0.2, 1)) if args.quick else ((16, 64, 256), (0.02, 0.05, 0.1, 0.2, 0.5, 1))
    turns = list(ChatWorkload(num_conversations=100 if args.quick else 400).turns()) if not args.trace else []
    requests = list(read_trace(args.trace))[: args.limit] if args.trace else [turn.as_request() for turn in turns]
    num_tokens, rates = count_full_pages(requests, 1), Rates({page_size: {} for page_size in sizes})
    for page_size, share in track([(p, s) for p in sizes for s in shares], console=Console(stderr=True)):
        num_pages = int(num_tokens * share) // page_size + 1
        caches = [PrefixCache(PageAllocator(num_pages, page_size), whole_pages=whole) for whole in (True, False)]
        whole, tails = (replay_chat(turns, cache) if turns else replay(requests, cache) for cache in caches)
        rates[page_size][share] = whole.token_hit_rate, tails.token_hit_rate
    return rates


def table_of(rates: Rates) -> Table:
    """A row for each capacity."""
    columns = [Column(f"page size {page_size}", justify="right") for page_size in rates]
    table = Table("capacity", *columns, title="prompt tokens found, whole pages → tails", title_justify="left")
    for share in next(iter(rates.values())):
        pairs = (by_share[share] for by_share in rates.values())
        table.add_row(f"{share:.0%}", *(f"[dim]{whole:.1%} →[/] [green]{tails:.1%}[/]" for whole, tails in pairs))
    return table


def draw(rates: Rates, path: str) -> None:
    """A panel for each page size; the shaded gap is what tails add."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True)
    for panel, (page_size, by_share) in zip(panels, rates.items(), strict=True):
        shares, whole, tails = [*by_share], *zip(*by_share.values(), strict=True)
        gain = max((100 * (tail - page) for page, tail in by_share.values()), key=abs)
        panel.fill_between(shares, whole, tails, color="#1b7f79", alpha=0.15, linewidth=0)
        panel.plot(shares, tails, "o-", color="#1b7f79", label="token-exact tails")
        panel.plot(shares, whole, "s--", color="#8a8a8a", label="whole pages only", markersize=4)
        panel.set_title(f"page size {page_size}: tails {gain:+.1f} points", fontsize=11)
        panel.set(xscale="log", xticks=shares, xlabel="capacity, share of all distinct tokens")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("prompt tokens found in the cache")
    panels[-1].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="a recorded trace (mooncake, sessions or text) instead of the made-up chat")
    parser.add_argument("--limit", type=int, default=2000, help="requests of the trace to replay (default: 2000)")
    parser.add_argument("--output", default="prefix_hit_rate.png", help="the picture (default: prefix_hit_rate.png)")
    parser.add_argument("--quick", action="store_true", help="fewer conversations, page sizes and capacities")
    args = parser.parse_args()
    draw(rates := measure(args), args.output)
    Console().print(table_of(rates), f"drawn in {args.output}")
