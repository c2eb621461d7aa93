"""Fixtures of several test files."""

import sys

import pytest
from making import quick_runs


@pytest.fixture
def one_core(monkeypatch):
    """Let threads of this process do everything, so that a test sees what is called, and can say what it gives."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def quickly(request):
    """Let runs of this process end quickly, where the test is not marked as one of whole runs."""
    if "ablation_experiment" not in sys.modules or request.node.get_closest_marker("whole"):
        yield
        return
    with quick_runs():
        yield
