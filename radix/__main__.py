"""The command line: `python -m radix replay TRACE`. It needs the extra `cli`, which is imported when it runs."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from radix.replay.readers import FORMATS, read_trace
from radix.replay.simulator import POLICIES, capacity_of, simulate
from radix.replay.tokenizer import load_tokenizer
from seqattn.command import run_command

if TYPE_CHECKING:
    import rich_click as click
    from rich.console import Console
    from rich.table import Table

    from radix.replay.report import ReplayReport
    from radix.replay.request import Request

_REPLAY_HELP = """Replay a trace of requests through a prefix cache and count what it finds.

TRACE is a file with one JSON object a line, plain, .gz or .xz: a Mooncake trace (hash ids of 512-token blocks),
sessions with nested requests (hash ids of their whole blocks), or calls with their full text.

The prompts are replayed one at a time, through the cache that serves real requests, over page numbers without memory
behind them. Without a capacity the cache is unbounded."""


@attrs.frozen(kw_only=True)
class _Options:
    """What was typed; click has checked types and ranges."""

    trace: Path
    trace_format: str
    page_size: int
    capacity_pages: int | None
    capacity_fraction: float | None
    policy: Literal["lru"]
    whole_pages: bool
    limit: int | None
    tokenizer: str | None
    as_json: bool


def main() -> None:
    """Runs the command line; an error of this project is one line on stderr and exit code 2."""
    run_command("python -m radix", _application)


def _application() -> click.RichGroup:
    """All commands; built by hand, not by decorators, so that importing this file needs no extra."""
    import rich_click as click

    replay = click.RichCommand(
        name="replay",
        callback=lambda **typed: _replay(_Options(**typed)),
        params=_replay_parameters(),
        help=_REPLAY_HELP,
        context_settings={"show_default": True},
    )
    return click.RichGroup(
        name="radix",
        commands=[replay],
        help="Prefix reuse for paged KV caches.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _replay_parameters() -> list[click.Parameter]:
    import rich_click as click
    from rich_click import Option

    count = click.IntRange(min=1)
    fraction = click.FloatRange(0.0, 1.0, min_open=True)
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    lines = "How to read the lines; auto goes by the fields of the first one."
    share = "Pages of the cache as a fraction of the trace's distinct pages; partial pages count unless --whole-pages."
    whole = "Share full pages only, as engines without token-exact tails do."
    words = "tiktoken encoding for a text trace; without one, the tokens are its UTF-8 bytes."
    return [
        click.Argument(["trace"], type=file),
        Option(["--format", "trace_format"], type=click.Choice(["auto", *FORMATS]), default="auto", help=lines),
        Option(["--page-size"], type=count, default=16, metavar="N", help="Token slots in a page."),
        Option(["--capacity-pages"], type=count, metavar="N", help="Pages of the cache."),
        Option(["--capacity-fraction"], type=fraction, metavar="F", help=share),
        Option(["--policy"], type=click.Choice(POLICIES), default="lru", help="Which pages are evicted first."),
        Option(["--whole-pages"], is_flag=True, help=whole),
        Option(["--limit"], type=count, metavar="N", help="Replay only the first N requests."),
        Option(["--tokenizer"], metavar="NAME", help=words),
        Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of a table."),
    ]


def _replay(options: _Options) -> None:
    """Reads, replays, prints: the result to stdout, progress to stderr."""
    import rich_click as click
    from rich.console import Console

    if options.capacity_pages is not None and options.capacity_fraction is not None:
        raise click.UsageError("--capacity-pages and --capacity-fraction exclude each other: give one of them.")
    console = Console(stderr=True)
    with console.status(f"reading {options.trace.name}"):
        encode = load_tokenizer(options.tokenizer) if options.tokenizer else None
        requests = list(islice(read_trace(options.trace, options.trace_format, encode=encode), options.limit))
    report = _simulate(requests, options, console)
    if options.as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        Console().print(_table(options.trace.name, report))


def _simulate(requests: list[Request], options: _Options, console: Console) -> ReplayReport:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    page_size, capacity_pages, whole_pages = options.page_size, options.capacity_pages, options.whole_pages
    if options.capacity_fraction is not None:
        fraction = options.capacity_fraction
        capacity_pages = capacity_of(requests, page_size=page_size, fraction=fraction, whole_pages=whole_pages)
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("replaying", total=len(requests))
        return simulate(
            requests,
            page_size=page_size,
            capacity_pages=capacity_pages,
            policy=options.policy,
            whole_pages=whole_pages,
            on_request=lambda: progress.advance(task),
        )


def _table(name: str, report: ReplayReport) -> Table:
    """The report in rows: what it is, how much, what share that is."""
    from rich.table import Table

    table = Table(title=name, title_style="bold", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(justify="right", style="bold green")
    forked = "off" if report.whole_pages else f"{report.forked_pages:,}"
    capacity = "unbounded" if report.capacity_pages is None else f"{report.capacity_pages:,}"
    table.add_row("requests", f"{report.requests:,}")
    table.add_row("input tokens", f"{report.input_tokens:,}")
    table.add_row("  found in the cache", f"{report.hit_tokens:,}", f"{report.token_hit_rate:.2%}")
    table.add_row(f"pages of {report.page_size:,} tokens", f"{report.page_accesses:,}")
    table.add_row("  shared whole", f"{report.hit_pages:,}", f"{report.page_hit_rate:.2%}")
    table.add_row("  partly matched, copied", forked)
    table.add_row("capacity in pages", capacity)
    table.add_row(f"  evicted ({report.policy})", f"{report.evicted_pages:,}")
    table.add_row("CPU seconds", f"{report.cpu_seconds:.2f}")
    return table


if __name__ == "__main__":
    main()
