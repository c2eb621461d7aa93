"""Fixtures of several test files."""

import pytest


@pytest.fixture
def one_core(monkeypatch):
    """Let threads of this process do everything, so that a test sees what is called, and can say what it gives."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def no_figures(monkeypatch):
    """Draw nothing, which takes most of the time of a small run with controls."""
    monkeypatch.setattr("report.figures.draw", lambda *_: {})
