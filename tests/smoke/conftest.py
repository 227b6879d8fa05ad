"""Runs that really train the embedded model; each is made once a session, and looked at by many tests."""

from __future__ import annotations

import pytest

from tests.runs import Finished, FinishedRun, run_in


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Return a function that runs some overrides, once for each set of them in a session."""
    done: dict[tuple[str, ...], FinishedRun] = {}

    def get(*overrides: str) -> FinishedRun:
        if overrides not in done:
            done[overrides] = run_in(tmp_path_factory.mktemp("run") / "folder", ["tracker=none", *overrides])
        return done[overrides]

    return get
