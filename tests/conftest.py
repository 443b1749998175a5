"""Shared fixtures: a run folder of its own for every test, chapters that need no data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture
def run_root(tmp_path, monkeypatch):
    """An empty folder in place of ``data/runs``."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("USEGMIX_RUNS", str(folder))
    return folder


@pytest.fixture
def repository():
    """Root of the repository."""
    return REPOSITORY
