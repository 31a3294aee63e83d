"""The command line: `python -m seqattn calibrate`. It needs the extra `cli`, which is imported when it runs."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from seqattn.calibrate import calibrate, calibration_shapes, lasting, measure
from seqattn.command import run_command
from seqattn.constants import Chip, constants_for, load_constants, path_of, save_constants, scaled
from seqattn.errors import ConstantsError, MissingExtraError, TensorError
from seqattn.fit import Measured, predict
from seqattn.load import Heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import rich_click as click
    from rich.table import Table

    from seqattn.device import Device

_HELP = """Measure what attention costs on this CUDA device, so that shared prefixes are split into the fastest levels.

It takes about a minute, longer when flashinfer compiles its kernels first, and wants the device for itself. The
constants are saved for this device and this version of flashinfer and used from then on, unless --out names another
file."""

_NUM_SHAPES = 60


@attrs.frozen(kw_only=True)
class _Options:
    """What was typed; click has checked types and ranges."""

    device: int
    heads: tuple[int, int, int]
    seconds: float
    out: Path | None
    show: bool


def main() -> None:
    """Runs the command line; an error of this project is one line on stderr and exit code 2."""
    run_command("python -m seqattn", _application)


def _application() -> click.RichGroup:
    """All commands; built by hand, not by decorators, so that importing this file needs no extra."""
    import rich_click as click
    from rich_click import Option

    number, positive = click.IntRange(min=0), click.IntRange(min=1)
    seconds = click.FloatRange(min=0, min_open=True)
    file = click.Path(dir_okay=False, path_type=Path)
    heads = "Query heads, KV heads and head_dim to measure with, in bfloat16."
    parameters: list[click.Parameter] = [
        Option(["--device"], type=number, default=0, metavar="N", help="Number of the CUDA device."),
        Option(["--heads"], type=positive, nargs=3, default=(32, 8, 128), help=heads),
        Option(
            ["--seconds"],
            type=seconds,
            default=50.0,
            metavar="S",
            help="Start no further batch so long after the first.",
        ),
        Option(["--out"], type=file, help="File to write, or with --show to read."),
        Option(["--show"], is_flag=True, help="Measure nothing: print the constants in use and where they come from."),
    ]
    command = click.RichCommand(
        name="calibrate",
        callback=lambda **typed: _calibrate(_Options(**typed)),
        params=parameters,
        help=_HELP,
        context_settings={"show_default": True},
    )
    return click.RichGroup(
        name="seqattn",
        commands=[command],
        help="Paged attention over shared prefixes.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _calibrate(options: _Options) -> None:
    """Shows, or measures, fits, saves and shows: the result to stdout, progress to stderr."""
    from rich.console import Console

    console = Console()
    if options.show and options.out is not None:
        console.print(_table(f"constants of {options.out}", load_constants(options.out)))
        return
    chip = _chip(options.device)
    path = path_of(chip.name) if options.out is None else options.out
    if options.show:
        try:
            found, source = load_constants(path, chip), str(path)
        except ConstantsError:  # of which it is warned, unless there is none
            found, source = constants_for(chip), "what comes with seqattn, for lack of a file that fits"
        console.print(_table(f"{chip.name}: constants of {source}", found))
        return
    if find_spec("flashinfer") is None:
        raise MissingExtraError("flashinfer", "flashinfer")
    heads = Heads(*options.heads)
    has_fa3 = chip.has_fa3 and _can_run_fa3()
    measured = _measured(options, heads, has_fa3=has_fa3)
    device = calibrate(measured, heads, attrs.evolve(scaled(chip), has_fa3=has_fa3))
    console.print(_table(f"{chip.name}: {len(measured)} ways measured", device))
    console.print(_quality(measured, heads, device))
    save_constants(path, device, chip)  # last: what took a minute is shown even if it cannot be written
    console.print(f"saved in {path}", soft_wrap=True)


def _chip(number: int) -> Chip:
    import torch

    if not torch.cuda.is_available():
        raise TensorError("torch finds no CUDA device: run this on the machine that the constants are for")
    if number >= (count := torch.cuda.device_count()):
        raise TensorError(f"there is no CUDA device {number}: torch finds {count}")
    return Chip.of(torch.cuda.get_device_properties(number))


def _can_run_fa3() -> bool:
    from rich.console import Console

    from seqattn.attention.fa3_sources import is_off, why_fa3_cannot_be_used

    reason = "it is turned off in the environment" if is_off() else why_fa3_cannot_be_used()
    if reason is not None:
        again = "these constants will not use it; calibrate again once it can be measured"
        Console(stderr=True).print(f"fa3 is not measured: {reason}; {again}", soft_wrap=True)
    return reason is None


def _measured(options: _Options, heads: Heads, *, has_fa3: bool) -> list[Measured]:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from seqattn.cuda_steps import CudaSteps

    device = torch.device("cuda", options.device)
    with torch.cuda.device(device):
        timer = CudaSteps(heads, device)
        shapes = calibration_shapes(_NUM_SHAPES, timer.most_tokens())
        columns = (TextColumn("measuring batches"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        goes_on = lasting(options.seconds, time.monotonic)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("measuring", total=len(shapes))

            def on_batch() -> bool:
                progress.advance(task)
                return goes_on()

            return measure(shapes, timer, has_fa3=has_fa3, on_batch=on_batch)


def _table(title: str, device: Device) -> Table:
    from rich.table import Table

    table = Table(title=title, title_style="bold", title_justify="left")
    table.add_column("constant", style="dim")
    table.add_column("value", justify="right")
    for name, value in attrs.asdict(device, filter=lambda attribute, _: attribute.init).items():
        named: dict[str, Any] = value if isinstance(value, dict) else {"": value}
        for part, number in named.items():
            shown = f"{number / 1e12:.3g} TB/s" if part.endswith("bytes_per_s") else f"{number:.4g}"
            table.add_row(f"{name} {part}".strip(), shown)
    return table


def _quality(measured: Sequence[Measured], heads: Heads, device: Device) -> str:
    """How near the predictions are, and what choosing by them costs."""
    predicted = predict(measured, heads, device).tolist()
    errors = sorted(abs(us / step.us - 1) for step, us in zip(measured, predicted, strict=True))
    losses = []
    for number in sorted({step.batch for step in measured}):
        ways = [(us, step.us) for step, us in zip(measured, predicted, strict=True) if step.batch == number]
        losses.append(min(ways)[1] / min(us for _, us in ways) - 1)
    losses.sort()
    half, most = losses[len(losses) // 2], losses[-1]
    near = f"predictions are {errors[len(errors) // 2]:.1%} off at the median"
    return f"{near}; the way chosen takes {half:.1%} longer than the best at the median, {most:.1%} at most"


if __name__ == "__main__":
    main()
