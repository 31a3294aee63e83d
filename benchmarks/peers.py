"""Virtual environments of the peers, made from the registry under `.bench/`; the project's own never sees them.

    python -m benchmarks.peers sglang vllm seqattn-0.0.2

An environment is made anew when its requirements have changed. Each has a torch of its own, and takes 1 to
2 GB of disk with torch's CPU build.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["PACKAGES", "interpreter", "make"]

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".bench"

#: peer → what is measured. Installed without its dependencies, most of which are CUDA; requirements/ has what it needs.
PACKAGES = {"sglang": "sglang==0.5.23", "vllm": "vllm==0.33.0", "seqattn-0.0.2": "seqattn==0.0.2"}


def interpreter(peer: str | None) -> str:
    """The Python that has this peer; None is the project itself, in the environment that runs now."""
    return sys.executable if peer is None else str(HOME / peer / "bin" / "python")


def make(peer: str) -> None:
    """Makes a peer's environment, unless it is there and its requirements have not changed since.

    Raises:
        CalledProcessError: pip failed; what it printed stands above.
    """
    folder, requirements = HOME / peer, ROOT / "benchmarks" / "requirements" / f"{peer}.txt"
    wanted = PACKAGES[peer] + "\n" + requirements.read_text(encoding="utf-8")
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing {PACKAGES[peer]} into .bench/{peer}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    (HOME / ".gitignore").write_text("*\n", encoding="utf-8")
    pip = [interpreter(peer), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-r", str(requirements)], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", PACKAGES[peer]], check=True, stdout=sys.stderr)
    stamp.write_text(wanted, encoding="utf-8")


def main() -> None:
    """Makes the environments named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", choices=[*PACKAGES, []], help="default: all of them")
    for peer in parser.parse_args().peers or PACKAGES:
        make(peer)


if __name__ == "__main__":
    main()
