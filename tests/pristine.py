"""What a process's tests share without meaning to: the state of the interpreter, of torch and of the hosts, remembered and put back.

Ranks serve one test after the other. What a test leaves behind there must not help or harm the next one, so each begins in the state
in which the process was forked, but for what was imported and cached since.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import numpy as np
import torch
from torch.overrides import _get_current_function_mode_stack

# packages whose modules hold state in global variables: groups, handles, flags, registries; and what is redirected where there is no GPU
HOSTS = ("muon_dist", "deepspeed", "megatron", *(() if torch.cuda.is_available() else ("torch.cuda",)))
# What takes seconds and is made once: Megatron's writers of checkpoints report through a queue that a process of its own serves
LASTING = {("megatron.core.dist_checkpointing.strategies.filesystem_async", "_results_queue")}
SERVERS = ("SyncManager",)  # names of such processes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
SET_BY_OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # variables that pytest and torch set when they please


class Interpreter:
    """What torch, the environment and the interpreter are set to."""

    def __init__(self) -> None:
        self._environment = _environment()
        self._filters = list(warnings.filters)  # put back, not compared: pytest has its own for every test
        self._seen = self._read()

    def _read(self) -> dict[str, Any]:
        return {
            "folder": os.getcwd(),
            "path": list(sys.path),
            "default dtype": torch.get_default_dtype(),
            "default device": torch.empty(0).device,
            "threads": torch.get_num_threads(),
            "fp32 precision of products": torch.get_float32_matmul_precision(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "gradients": torch.is_grad_enabled(),
            "function modes": _get_current_function_mode_stack(),
            "signals": [signal.getsignal(number) for number in SIGNALS],
        }

    def changed(self) -> list[str]:
        """What is not as it was, by name."""
        now = self._read()
        names = [name for name, value in self._seen.items() if now[name] != value]
        was, is_now = self._environment, _environment()
        return names + sorted(f"environment: {key}" for key in was.keys() | is_now.keys() if was.get(key) != is_now.get(key))

    def put_back(self) -> None:
        warnings.filters[:] = self._filters
        names = self.changed()
        if not names:
            return
        for name in {name.partition(": ")[2] for name in names if name.startswith("environment: ")}:
            os.environ.pop(name, None)
            if name in self._environment:
                os.environ[name] = self._environment[name]
        seen = self._seen
        os.chdir(seen["folder"])
        sys.path[:] = seen["path"]
        torch.set_default_dtype(seen["default dtype"])
        if "default device" in names:
            torch.set_default_device(None if seen["default device"].type == "cpu" else seen["default device"])
        torch.set_num_threads(seen["threads"])
        torch.set_float32_matmul_precision(seen["fp32 precision of products"])
        torch.use_deterministic_algorithms(seen["deterministic algorithms"])
        torch.set_grad_enabled(seen["gradients"])
        while len(modes := _get_current_function_mode_stack()) > len(seen["function modes"]):
            modes[-1].__exit__(None, None, None)
        for number, handler in zip(SIGNALS, seen["signals"], strict=True):
            signal.signal(number, handler)


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in SET_BY_OTHERS}


class Globals:
    """The global variables of the hosts' modules, the attributes of their classes, and what lies directly in those that are containers."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._holders: list[tuple[Any, dict[str, tuple[Any, list[Any] | None]]]] = []
        self.add_what_was_imported()

    def add_what_was_imported(self) -> None:
        """Remember modules that are new since the last call as they are now."""
        names = [name for name in sys.modules if name not in self._known and f"{name}.".startswith(tuple(f"{host}." for host in HOSTS))]
        self._known.update(names)
        for name in names:
            module = sys.modules[name]
            classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
            self._holders += [(each, _variables(each)) for each in (module, *classes)]

    def changed(self) -> list[str]:
        return [f"{getattr(holder, '__qualname__', holder.__name__)}.{key}" for holder, key, *_ in self._differences()]

    def put_back(self) -> None:
        for holder, key, was, inside in self._differences():
            if was is _ABSENT:
                delattr(holder, key)
                continue
            setattr(holder, key, was)
            if isinstance(was, list):
                was[:] = inside
            elif isinstance(was, (dict, set)):
                was.clear()
                was.update(inside)
        if "accelerate.state" in sys.modules:  # its singletons keep what they know outside their classes
            state = sys.modules["accelerate.state"]
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()

    def _differences(self) -> list[tuple[Any, str, Any, Any]]:
        found: list[tuple[Any, str, Any, Any]] = []
        for holder, variables in self._holders:
            now = vars(holder)
            for key, (was, inside) in variables.items():
                value = now.get(key, _ABSENT)
                if value is not was or (inside is not None and not _same(_inside(value), inside)):
                    found.append((holder, key, was, inside))
            for key in [key for key in now if key not in variables and not _stays(holder, key)]:
                if not isinstance(now[key], type(sys)):  # a submodule that was imported since
                    found.append((holder, key, _ABSENT, None))
        return found


def _variables(holder: Any) -> dict[str, tuple[Any, list[Any] | None]]:
    return {key: (value, _inside(value)) for key, value in vars(holder).items() if not _stays(holder, key)}


def _stays(holder: Any, key: str) -> bool:
    return key.startswith("__") or key == "_abc_impl" or (holder.__name__, key) in LASTING


_ABSENT = object()


def _inside(value: Any) -> list[Any] | None:
    """The elements of a container that can change, in their order; of a dict, pairs."""
    kind = type(value)
    return list(value.items()) if kind is dict else list(value) if kind in (list, set) else None


def _same(now: list[Any] | None, was: list[Any]) -> bool:
    if now is None or len(now) != len(was):
        return False
    return all(a is b or (type(a) is tuple and len(a) == 2 and a[0] is b[0] and a[1] is b[1]) for a, b in zip(now, was, strict=True))


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


# Of a process. A group that was destroyed keeps its three, which look for work all the time, for as long as anyone holds it: DeepSpeed's
# engines are never freed, since hooks on gradients hold them.
MOST_THREADS = 40


class Leftovers:
    """What can't be put back: processes and threads that a test started and that still run."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())

    def found(self) -> list[str]:
        names = [f"thread {t.name}" for t in threading.enumerate() if t not in self._threads and t.is_alive()]
        names += [f"process {p.name}" for p in multiprocessing.active_children() if not p.name.startswith(SERVERS)]
        every = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
        return [*names, f"{every} threads"] if every > MOST_THREADS else names
