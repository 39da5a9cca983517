"""References named by environment variables, and a table of what was measured against them."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

MEASURED = pytest.StashKey[list]()


def reference(variable, python_variable):
    """Return the reference a variable names; skip the test if it names none."""
    from harness import Reference

    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no checkout of the reference; see tests/parity/README.md")
    python = os.environ.get(python_variable) or sys.executable
    return Reference(Path(folder).resolve(), python)


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
