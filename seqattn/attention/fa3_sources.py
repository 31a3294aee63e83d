"""flashinfer's fa3, compiled with the barrier that its results need.

A block of fa3 writes its results to shared memory, and what lies there to the device's memory once all of its threads
have written. In flashinfer 0.6.18 and 0.7.2 they say so twice on one barrier, by `arrive` and by `sync`, and it counts
both; so it may open when some have come twice:

    seven of eight warps   arrive  sync ──▶ seven and one have come: one of them goes on, and writes out as results
    the eighth             still writes     what the eighth has not written yet

Seen on an H200, in two of a thousand runs of one batch: a row's query heads of one KV head were wrong, by several
times their size. flashinfer compiles the kernel when it is first needed, from sources that come with it. From here on
it compiles a copy of them without the first of the two, under another name; its own files stay as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from seqattn.device import Device

__all__ = ["copied_without_it", "mended", "sound_costs", "why_fa3_cannot_be_used", "without_it"]

_EPILOGUE = Path("flashinfer/attention/hopper/epilogue.cuh")
#: what comes before the second, on the same barrier of as many threads
_BARRIER = r"\(\s*NUM_MMA_THREADS,\s*cutlass::arch::ReservedNamedBarriers::EpilogueBarrier\s*\);"
_FIRST = re.compile(rf"[ \t]*cutlass::arch::NamedBarrier::arrive{_BARRIER}\n?")
_SECOND = re.compile(rf"cutlass::arch::NamedBarrier::sync{_BARRIER}")
_SUFFIX = "_one_barrier"


def sound_costs(costs: Device) -> Device:
    """A device's constants: without fa3, after a warning, where it cannot be computed right."""
    reason = why_fa3_cannot_be_used() if costs.has_fa3 else None
    if reason is None:
        return costs
    warnings.warn(
        f"this flashinfer's fa3 gives wrong results at times, and cannot be compiled without that mistake: {reason}. "
        "Shared levels are computed by fa2, which is slower; with a CUDA compiler (nvcc) installed they need not be",
        RuntimeWarning,
        stacklevel=2,
    )
    return evolve(costs, has_fa3=False)


@cache
def why_fa3_cannot_be_used() -> str | None:
    """Sees to it that fa3 is computed right from here on; why that cannot be, or None.

    Cost: a copy of five megabytes when a version of flashinfer is first met, and what flashinfer needs to compile fa3,
    one or two minutes once for each dtype and head_dim.
    """
    import flashinfer.jit.cpp_ext
    import flashinfer.prefill

    jit, prefill = flashinfer.jit, flashinfer.prefill
    try:
        include = Path(jit.env.FLASHINFER_INCLUDE_DIR)
        text = (include / _EPILOGUE).read_text(encoding="utf-8")
        if without_it(text) is None:
            return None
        if os.environ.get("FLASHINFER_DISABLE_JIT"):
            return "FLASHINFER_DISABLE_JIT is set"
        compiler = Path(os.environ.get("FLASHINFER_NVCC") or Path(jit.cpp_ext.get_cuda_path(), "bin", "nvcc"))
        if shutil.which(compiler) is None:
            return f"there is no compiler at {compiler}"
        sources = copied_without_it(include, Path(jit.env.FLASHINFER_GEN_SRC_DIR))
    except (AttributeError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    prefill.gen_batch_prefill_module = mended(prefill.gen_batch_prefill_module, sources)
    prefill.get_batch_prefill_module.cache_clear()  # it may have been asked for fa3 before
    return None


def without_it(text: str) -> str | None:
    """The file without the first of the two; None if it has not both, once each."""
    if len(_FIRST.findall(text)) != 1 or len(_SECOND.findall(text)) != 1:
        return None
    return _FIRST.sub("", text)


def copied_without_it(include: Path, folder: Path) -> Path:
    """A copy of flashinfer's headers in a folder, with the one file changed; made once for each content of that file.

    Args:
        include: the headers.
        folder: where the copy is to be; made if it is not there.

    Raises:
        OSError: it cannot be written.
    """
    text = (include / _EPILOGUE).read_text(encoding="utf-8")
    changed = without_it(text)
    assert changed is not None
    target = folder / f"seqattn-fa3-{sha256((str(include) + text).encode()).hexdigest()[:16]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder))
        try:
            shutil.copytree(include / "flashinfer", made / "flashinfer")
            (made / _EPILOGUE).chmod(0o644)
            (made / _EPILOGUE).write_text(changed, encoding="utf-8")
            made.chmod(0o755)
            made.rename(target)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not target.exists():  # by another process, meanwhile
                raise
    return target


def mended(generate: Callable[..., Any], sources: Path) -> Callable[..., Any]:
    """The function by which flashinfer says how a kernel is compiled, with these headers before all others for fa3."""

    def gen_batch_prefill_module(backend: str, *args: object, **options: object) -> Any:  # noqa: ANN401  flashinfer's, untyped
        spec = generate(backend, *args, **options)
        if backend != "fa3":
            return spec
        headers = [sources, *(spec.extra_include_dirs or ())]
        return replace(spec, name=spec.name + _SUFFIX, extra_include_dirs=headers)

    return gen_batch_prefill_module
