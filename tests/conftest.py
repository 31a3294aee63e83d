"""Fixtures and settings that every test has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.traces import TRACES, why_absent

# No deadline: a page of a few tokens is fast, but a shared machine is not. CI draws the same examples on every run, so
# that a failure there is a failure of the change; what it prints reproduces the failure anywhere.
settings.register_profile("dev", deadline=None, max_examples=50, stateful_step_count=30)
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=200,
    stateful_step_count=50,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of recorded traces; a test that asks for it is skipped where there is none."""
    reason = why_absent()
    if reason:
        pytest.skip(reason)
    return TRACES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where there is no CUDA."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch  # only where a test needs to know: it takes seconds

    return torch.cuda.is_available()
