"""A table of what was measured against the references."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

MEASURED = pytest.StashKey[list]()


@pytest.fixture
def measured(request):
    """Return a function that checks a relative error and keeps it for the table."""
    from harness import RELATIVE

    table = request.config.stash.setdefault(MEASURED, [])

    def check(what, value, limit=RELATIVE):
        table.append((request.node.name, what, value, limit))
        assert value <= limit, f"{what}: {value:.2e} above {limit:.0e}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(MEASURED, [])
    if table:
        terminalreporter.section("relative errors")
    for test, what, value, limit in table:
        terminalreporter.write_line(f"{value:.2e}  (limit {limit:.0e})  {test}: {what}")
