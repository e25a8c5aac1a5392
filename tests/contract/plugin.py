"""Collect what each recipe does in each case, expect the refusals, and keep the compatibility matrix up to date."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.contract import matrix


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-matrix", action="store_true", help="write the compatibility matrix instead of checking it"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "case(group): a case of the contract, under its column of the matrix")
    config.addinivalue_line("markers", "drawn: figures are drawn and not only announced")
    if not hasattr(config, "workerinput"):  # in a worker of pytest-xdist somebody else gathers
        config.pluginmanager.register(MatrixKeeper(write=config.getoption("--write-matrix")))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Record the outcome of a case; one that the recipe's method refuses must raise the error that it promises."""
    mark = pyfuncitem.get_closest_marker("case")
    if mark is None:
        return (yield)
    recipe = pyfuncitem.callspec.params["recipe"]
    (group,) = mark.args
    refusal = recipe.refused.get(group)
    if refusal is None:
        yield
    else:
        with pytest.raises(refusal):
            yield
    pyfuncitem.user_properties.append(("contract", (recipe.name, group, "refused" if refusal else "yes")))
    return True


class MatrixKeeper:
    """Gathers the outcomes of a session, and compares or writes the tables when all of them are known."""

    def __init__(self, *, write: bool) -> None:
        self.write = write
        self.outcomes: dict[tuple[str, str], str] = {}
        self.difference = 0.0
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == "contract":
                recipe, group, outcome = value
                self.outcomes[recipe, group] = outcome
            elif name == "difference":
                self.difference = max(self.difference, value)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.outcomes or session.testsfailed:
            return
        from tests.contract.recipes import RECIPES

        missing = matrix.missing(self.outcomes, RECIPES)
        if missing:
            if self.write:
                self.lines.append(f"not written, these did not run: {missing}")
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        self.lines.append(f"largest relative difference to the reference: {self.difference:.1e}")
        stale = matrix.update(matrix.ROOT, self.outcomes, RECIPES, write=self.write)
        self.lines += stale.lines
        if stale.paths and not self.write:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.lines:
            terminalreporter.section("compatibility matrix")
            for line in self.lines:
                terminalreporter.line(line)
