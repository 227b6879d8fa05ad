"""The seed of the faults, what does them, and the tally at the end."""

from __future__ import annotations

import os
from random import Random

import pytest

from tests.faults.harness import Server, Tally
from tests.forked import ForkServer

SEED = int(os.environ.get("LORA_EXP_FAULT_SEED", "0"))
_tally = Tally()


@pytest.fixture(scope="session")
def tally() -> Tally:
    return _tally


@pytest.fixture
def random(request: pytest.FixtureRequest) -> Random:
    """Return the moments of a test: the same for the same seed."""
    return Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture(scope="session")
def server(fork_server: ForkServer) -> Server:
    return Server(fork_server)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _tally.injected:
        terminalreporter.section(f"faults, LORA_EXP_FAULT_SEED={SEED}")
        for line in _tally.lines():
            terminalreporter.write_line(line)
