"""Settings for all tests: what --all adds, that nothing is left behind, and the rule for skips."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from . import pristine
from .ranks import end_ranks

torch.set_num_threads(1)

# Why a test may be left to --all: what `pytest.mark.more` is given. A run without --all says how many each of them has.
MORE: dict[str, str] = {
    "product": "other members of a product of options; the run without --all has pairs of them",
    "random": "more random configurations",
    "kills": "more kills of the same kind",
    "repeat": "the same claim at another size, launcher or host",
    "timing": "seconds are compared, which takes a machine that is not busy",
    "slow system": "Slurm, network namespaces, a browser: each takes tens of seconds",
}

# Reasons for which a test may be skipped, as they begin.
ALLOWED_SKIPS: tuple[str, ...] = (
    "Megatron's own Muon needs emerging-optimizers (Python 3.12)",  # tests/run_megatron_current.sh has it
    "Megatron-LM's source is not here (MEGATRON_LM)",  # only pip's package is; tests/README.md
    "megatron.training comes with megatron-core 0.19 (Python 3.12)",
    # where a GPU is, there may be torch and nothing else (tests/gpu.sh)
    "deepspeed is not installed",
    "megatron-core is not installed",
    "transformers is not installed",
    "gloo lacks a collective for tensors on a GPU",
    # what .ci/run installs, and a user's machine may not have
    "Slurm is not installed",
    "Slurm's daemons need root",
    "mounting a small file system needs root",
    "network namespaces need root",
    "Chromium is not installed",
)

SHARED = {"cluster", "hosts", "runs"}  # fixtures of a module that start daemons, make networks, or train

_unlisted: list[str] = []
_left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also what is only more of the same, and the slow systems")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"more(reason): runs with --all only; reason is one of {', '.join(MORE)}")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `more`, unless it was asked for with --all or by its name."""
    named = any("::" in argument for argument in config.args)
    left_out = []
    for item in items:
        mark = item.get_closest_marker("more")
        if mark is None:
            continue
        if mark.args not in {(reason,) for reason in MORE}:
            raise pytest.UsageError(f"{item.nodeid}: pytest.mark.more takes one of {', '.join(MORE)}, not {mark.args}")
        if not config.getoption("--all") and not named:
            left_out.append(item)
            _left_out[mark.args[0]] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for item in items:  # where tests run on several workers, those that share what takes long to make run on one
        if shared := SHARED & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(min(shared)))


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
    if _left_out:
        terminalreporter.section("left to --all")
        for reason, count in _left_out.most_common():
            terminalreporter.write_line(f"{count:5} {MORE[reason]}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of pytest-xdist left out: each of them collects all tests. One that crashed tells nothing."""
    told = getattr(node, "workeroutput", {}).get("left_out", {})
    _left_out.update({reason: count - _left_out[reason] for reason, count in told.items()})


def pytest_sessionfinish(session: pytest.Session) -> None:
    end_ranks()
    if hasattr(session.config, "workeroutput"):  # pytest-xdist: this is a worker, which shows nothing itself
        session.config.workeroutput["left_out"] = dict(_left_out)
    if _unlisted and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
