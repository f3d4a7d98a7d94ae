"""Settings for all tests, and the rule for skips: a skip whose reason is not listed here fails the run."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from . import pristine
from .ranks import end_ranks

torch.set_num_threads(1)

# Reasons for which a test may be skipped, as they begin.
ALLOWED_SKIPS: tuple[str, ...] = (
    "Megatron's own Muon needs emerging-optimizers (Python 3.12)",  # tests/run_megatron_current.sh has it
    "megatron.training comes with megatron-core 0.19 (Python 3.12)",
    # where a GPU is, there may be torch and nothing else (tests/gpu.sh)
    "deepspeed is not installed",
    "megatron-core is not installed",
    "gloo lacks a collective for tensors on a GPU",
    # what .ci/run installs, and a user's machine may not have
    "Slurm is not installed",
    "Slurm's daemons need root",
    "mounting a small file system needs root",
    "network namespaces need root",
    "Chromium is not installed",
)

_unlisted: list[str] = []


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that changes what other tests of this process run under puts it back; a test of ranks can't help it (tests/ranks.py)."""
    before = pristine.Interpreter()
    yield
    changed = before.changed()
    before.put_back()
    assert not changed, f"the test has left changed: {', '.join(changed)}"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    pytest_runtest_logreport(report)


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED_SKIPS or ("\0",)):
            _unlisted.append(f"{report.nodeid}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _unlisted:
        terminalreporter.write_line(f"skipped for a reason that tests/conftest.py does not list: {line}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    end_ranks()
    if _unlisted and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
