"""flashinfer's fa3, compiled with the barrier that its results need.

A block of fa3 writes its results to shared memory, and what lies there to the device's memory once all of its threads
have written. In flashinfer 0.6.18 and 0.7.2 they say so twice on one barrier, by `arrive` and by `sync`, and it counts
both; so it may open when some have come twice:

    seven of eight warps   arrive  sync ──▶ seven and one have come: one of them goes on, and writes out as results
    the eighth             still writes     what the eighth has not written yet

Seen on an H200, in 0.2 % of the runs of one batch: a row's query heads of one KV head were wrong, by several times
their size. flashinfer compiles the kernel when it is first needed, from sources that come with it. From here on it
compiles a copy of them without the first of the two, under another name; its own files stay as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import warnings
from dataclasses import is_dataclass, replace
from functools import partial, wraps
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

from seqattn.errors import BadValueError, SeqAttnError

if TYPE_CHECKING:
    from collections.abc import Callable

    from seqattn.device import Device

__all__ = [
    "copy_mended",
    "has_early_arrival",
    "is_off",
    "mended",
    "sound_costs",
    "why_fa3_cannot_be_used",
    "without_early_arrival",
]

_EPILOGUE = Path("flashinfer/attention/hopper/epilogue.cuh")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
#: the first of the two and the second, by all threads that compute
_CALL = r"[ \t]*(?:\w+\s*::\s*)*NamedBarrier\s*::\s*{}\s*\(\s*NUM_MMA_THREADS\s*,[^;]*\bEpilogueBarrier\s*\)\s*;\n?"
_FIRST, _SECOND = re.compile(_CALL.format("arrive")), re.compile(_CALL.format("sync"))
_SUFFIX = "_one_barrier"
#: turns fa3 off, by any of these, or says that it is not
_SWITCH = "SEQATTN_FA3"
_OFF, _ON = ("off", "0", "no", "false"), ("", "on", "1", "yes", "true")
_LOCK = threading.Lock()


def sound_costs(costs: Device) -> Device:
    """A device's constants: without fa3, after a warning, where it cannot be computed right."""
    if not costs.has_fa3:
        return costs
    if is_off():
        return evolve(costs, has_fa3=False)
    reason = why_fa3_cannot_be_used()
    if reason is None:
        return costs
    warnings.warn(
        f"this flashinfer's fa3 gives wrong results at times, and cannot be compiled without that mistake: {reason}. "
        f"Shared levels are computed by fa2, which is slower; with a CUDA compiler (nvcc) installed they need not be. "
        f"{_SWITCH}=off says that this is known",
        RuntimeWarning,
        stacklevel=4,  # who made the PagedAttention
    )
    return evolve(costs, has_fa3=False)


def is_off() -> bool:
    """Whether fa3 is turned off in the environment; BadValueError for what is neither on nor off."""
    value = os.environ.get(_SWITCH, "")
    if (word := value.strip().lower()) not in _OFF + _ON:
        raise BadValueError(f"{_SWITCH} is {value!r} in the environment: it must be 'off' or 'on'")
    return word in _OFF


def why_fa3_cannot_be_used() -> str | None:
    """Sees to it that fa3 is computed right from here on; why that cannot be, or None.

    Cost: a copy of five megabytes when a version of flashinfer is first met, and what flashinfer needs to compile fa3,
    one or two minutes once for each dtype and head_dim, when it is first planned.
    """
    with _LOCK:
        try:
            return _mend()
        except (AttributeError, ImportError, OSError, RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def _mend() -> str | None:
    """See `why_fa3_cannot_be_used`; what it raises is a reason too, and nothing is done then."""
    import flashinfer.jit.cpp_ext
    import flashinfer.prefill

    jit, prefill = flashinfer.jit, flashinfer.prefill
    generate, forget = prefill.gen_batch_prefill_module, prefill.get_batch_prefill_module.cache_clear
    if hasattr(generate, _SUFFIX):
        return None
    include = Path(jit.env.FLASHINFER_INCLUDE_DIR)
    text = (include / _EPILOGUE).read_text(encoding="utf-8")
    if not has_early_arrival(text):
        return None
    if without_early_arrival(text) is None:
        return f"{include / _EPILOGUE} is not one of those that are known"
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        return "FLASHINFER_DISABLE_JIT is set"
    compiler = Path(os.environ.get("FLASHINFER_NVCC") or Path(jit.cpp_ext.get_cuda_path(), "bin", "nvcc"))
    if shutil.which(compiler) is None:
        return f"there is no compiler at {compiler}"
    prefill.gen_batch_prefill_module = mended(generate, copy_mended(include, Path(jit.env.FLASHINFER_GEN_SRC_DIR)))
    forget()  # it may have been asked for fa3 before
    return None


def has_early_arrival(text: str) -> bool:
    """Whether all threads arrive at the barrier before they wait there, comments aside."""
    return _FIRST.search(_COMMENT.sub("", text)) is not None


def without_early_arrival(text: str) -> str | None:
    """The file without the first of the two; None if it has not both, once each."""
    if len(_FIRST.findall(text)) != 1 or len(_SECOND.findall(text)) != 1:
        return None
    return _FIRST.sub("", text)


def copy_mended(include: Path, folder: Path) -> Path:
    """A copy of flashinfer's headers in a folder, with the one file changed; made once for what is in them.

    Args:
        include: the headers.
        folder: where the copy is to be; made if it is not there.

    Raises:
        OSError: it cannot be written.
    """
    changed = without_early_arrival((include / _EPILOGUE).read_text(encoding="utf-8"))
    assert changed is not None
    digest = sha256(str(include).encode())
    for header in sorted(path for path in (include / "flashinfer").rglob("*") if path.is_file()):
        digest.update(str(header).encode() + header.read_bytes())
    target = folder / f"seqattn-fa3-{digest.hexdigest()[:16]}"
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
            if not target.exists():  # by another process, meanwhile
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def mended(generate: Callable[..., Any], sources: Path) -> Callable[..., Any]:
    """The function by which flashinfer says how a kernel is compiled, with these headers before all others for fa3."""

    @wraps(generate)
    def gen_batch_prefill_module(backend: str, *args: object, **options: object) -> Any:  # noqa: ANN401  flashinfer's, untyped
        spec = generate(backend, *args, **options)
        if backend != "fa3":
            return spec
        is_known = is_dataclass(spec) and hasattr(spec, "extra_include_dirs")
        if not is_known:
            raise SeqAttnError(f"this flashinfer describes fa3 by a {type(spec).__name__}, which is not known: {_HOW}")
        headers = [sources, *(spec.extra_include_dirs or ())]
        ours: Any = replace(spec, name=spec.name + _SUFFIX, extra_include_dirs=headers)
        ours.build_and_load = partial(_built, ours.build_and_load)
        return ours

    setattr(gen_batch_prefill_module, _SUFFIX, True)
    return gen_batch_prefill_module


_HOW = f"set {_SWITCH}=off, and fa2, which is slower, computes what fa3 would have"


def _built(build: Callable[[], Any]) -> Any:  # noqa: ANN401  as above
    try:
        return build()
    except (OSError, RuntimeError) as error:
        raise SeqAttnError(f"fa3 could not be compiled without its mistake: {error}; {_HOW}") from error
