"""When a rank dies, fails or stands still, every other one ends, in a set time, with a message that names it.

Rank 0 listens, and every rank keeps a connection to it, over which it says once in a while how far it has come. A process that dies
closes its connection, so its death is known at once, whatever the backend; a host that vanishes, or a process that is stopped, falls
silent; a rank that stands still falls behind. Rank 0 tells all who it was. Nothing here touches collectives or devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from .bootstrap import Ranks

GRACE = 0.3  # seconds in which a better reason than the first one may arrive
STRANGER_BYTES, STRANGER_SECONDS = 4096, 10.0  # what a connection may send, and how long it may last, until it has shown the job's token
SILENT_PULSES = 5  # a rank that missed so many pulses is taken for lost once a collective has failed on another
LOST, FAILED, BROKEN_COLLECTIVE = range(3)  # what is told of a rank, the most telling first
EXIT_STATUS = 1


class Watchdog:
    """Watches all ranks of a job. Making one is collective, over the default process group.

    Args:
        ranks: this process's place.
        timeout: seconds without any progress, or without a word from a rank, until the job ends. A step, an evaluation or a checkpoint
            must not take longer.
        ending: is called with the message before this process ends because of another rank.

    Use it as a context: an exception that leaves the block is told to all ranks, and ends this process with its traceback.
    """

    def __init__(self, ranks: Ranks, *, timeout: float, ending: Callable[[str], None] | None = None) -> None:
        if not timeout > 0:
            raise ValueError(f"the watchdog's timeout must be a positive number of seconds, got {timeout!r}")
        self._ranks, self._timeout, self._ending = ranks, timeout, ending
        self._count, self._step, self._phase = 0, 0, "start"
        self._told = threading.Event()  # this process knows why it ends
        self._closed = False
        self._all_done = threading.Event()
        self._socket: socket.socket | None = None
        if ranks.world_size == 1:
            return
        self._pulse = min(1 + ranks.world_size / 2000, timeout / 4)  # seconds; rank 0 hears at most 2,000 ranks a second
        server: _Server | None = None
        met: list[Any] = [None]
        if ranks.rank == 0:
            server = _Server(ranks.world_size, timeout, self._pulse)
            met = [(server.port, server.token, socket.gethostname())]
        dist.broadcast_object_list(met)
        port, token, host = met[0]
        if server is not None:
            server.start()
        self._socket = socket.create_connection(("127.0.0.1" if server else ranks.master_addr, port), timeout=timeout)
        self._lock = threading.Lock()
        self._send({"token": token, "rank": ranks.rank, "host": socket.gethostname(), "pid": os.getpid()})
        # where rank 0 itself is lost nobody chooses who speaks, so on every host the first rank that is left does
        self._speaks_alone = ranks.local_rank == (1 if host == socket.gethostname() else 0)
        threading.Thread(target=self._listen, daemon=True, name="watchdog").start()

    def mark(self, phase: str, step: int) -> None:
        """Say that this rank makes progress: it begins `phase` of `step`. All ranks mark the same phases in the same order."""
        self._phase, self._step = phase, step
        self._count += 1

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        elif self._socket is not None:
            self._fail(error)
        elif self._ending is not None:  # alone: the error goes its way
            self._ending(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Say goodbye: this rank's work is done. Returns when that of all ranks is, so that nobody misses rank 0's ear."""
        if self._socket is None or self._closed:
            return
        with contextlib.suppress(OSError):
            self._send({"bye": True})
            self._all_done.wait()  # or this process ends, since another one did not get there

    def _fail(self, error: BaseException) -> NoReturn:
        """Tell all ranks what happened here, hear who is to blame, and end this process."""
        broken = _is_broken_collective(error)
        if not broken and not self._told.is_set():
            sys.excepthook(type(error), error, error.__traceback__)
        with contextlib.suppress(OSError):
            self._send({**self._progress(), "failed": f"{type(error).__name__}: {error}".strip(), "broken": broken})
        self._told.wait(SILENT_PULSES * self._pulse + 4 * GRACE + 2)
        time.sleep(0.2)  # the thread that was told ends this process
        if broken:
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(EXIT_STATUS)

    # ------------------------------------------------------------------------------------------------ this rank's thread

    def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        with self._lock:
            if not self._closed:  # after goodbye nothing is sent
                self._closed = "bye" in message
                self._socket.sendall((json.dumps(message) + "\n").encode())

    def _progress(self) -> dict[str, Any]:
        return {"count": self._count, "step": self._step, "phase": self._phase}

    def _listen(self) -> None:
        assert self._socket is not None
        self._socket.settimeout(self._pulse)
        heard, buffer = time.monotonic(), b""
        while True:
            try:
                data = self._socket.recv(1 << 16)
                if not data:
                    self._rank_0_is_lost("its connection closed")
                    return
                heard = time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if "show stack" in message:
                        self._show_stack()
                    if "verdict" in message:
                        self._end(message["verdict"], message["speaks"])
                    if "done" in message:
                        self._socket.close()
                        self._all_done.set()
                        return
                self._send(self._progress())
            except TimeoutError:
                if time.monotonic() - heard > self._timeout:
                    self._rank_0_is_lost(f"it has been silent for {self._timeout:g} s")
                    return
            except OSError:
                self._rank_0_is_lost("its connection broke")
                return

    def _rank_0_is_lost(self, how: str) -> None:
        self._end(f"rank 0 was lost: {how}. This rank was at step {self._step} ({self._phase})", self._speaks_alone)

    def _show_stack(self) -> None:
        """Where this rank's main thread is: what the ranks of a deadlock wait for."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        print(f"rank {self._ranks.rank} at step {self._step} ({self._phase}) is here:\n{stack}", file=sys.stderr, flush=True)

    def _end(self, verdict: str, speaks: bool) -> None:
        """End this process, whatever its main thread waits for."""
        self._told.set()
        if speaks:
            print(f"rank {self._ranks.rank} ends: {verdict}", file=sys.stderr, flush=True)
        if self._ending is not None:
            with contextlib.suppress(Exception):
                self._ending(verdict)
        sys.stdout.flush()
        os._exit(EXIT_STATUS)


def _is_broken_collective(error: BaseException | None) -> bool:
    """Whether an exception only says that a peer is gone."""
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset", "recvvalue failed", "broken pipe", "socket")
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


# ------------------------------------------------------------------------------------------------------ rank 0's other side


@dataclass
class _Peer:
    """What rank 0 knows of a rank."""

    connection: socket.socket
    buffer: bytes = b""
    rank: int = -1  # until it has said which one it is
    host: str = ""
    pid: int = 0
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    count: int = 0
    step: int = 0
    phase: str = "start"
    gone: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}) at step {self.step} ({self.phase})"


class _Server:
    """Hears all ranks, decides whose fault it is, and tells them."""

    def __init__(self, world_size: int, timeout: float, pulse: float) -> None:
        both = socket.has_dualstack_ipv6()
        self._listener = socket.create_server(
            ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=min(world_size, 4096)
        )
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._world_size, self._timeout, self._pulse = world_size, timeout, pulse
        self._peers: dict[int, _Peer] = {}
        self._said: list[tuple[int, float, int, str]] = []  # (what kind, when, rank, words)
        self._standstill = False
        self._selector = selectors.DefaultSelector()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="watchdog of all ranks").start()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # without this thread nobody would be watched
            self._say(FAILED, 0, f"the watchdog of rank 0 failed: {type(error).__name__}: {error}")
            self._announce()

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        began = last_pulse = time.monotonic()
        while True:
            for key, _ in self._selector.select(timeout=min(0.1, self._pulse / 2)):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - last_pulse >= self._pulse:
                last_pulse = now
                for peer in self._peers.values():
                    self._tell(peer, {"pulse": 1})
                connected = [key.data for key in self._selector.get_map().values() if isinstance(key.data, _Peer)]
                for stranger in [peer for peer in connected if peer.rank < 0 and now - peer.moved > STRANGER_SECONDS]:
                    self._drop(stranger)
            self._look(now, began)
            if self._said and now - min(when for _, when, _, _ in self._said) >= self._patience():
                self._announce()
                return
            if not self._said and len(self._peers) == self._world_size and all(peer.gone for peer in self._peers.values()):
                self._tell_all(lambda peer: {"done": 1})
                return

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(1)
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(1 << 16)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data or (peer.rank < 0 and len(peer.buffer) + len(data) > STRANGER_BYTES):
            self._drop(peer)
            if peer.rank >= 0 and not peer.gone:
                peer.gone = True
                self._say(LOST, peer.rank, f"{peer} was lost: its connection closed, so it was killed or crashed")
            return
        peer.heard = time.monotonic()
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            try:
                self._hear(peer, json.loads(line))
            except Exception:  # whatever it is, it is not one of ours
                self._drop(peer)
                return

    def _drop(self, peer: _Peer) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)
        peer.connection.close()

    def _hear(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.rank < 0:
            if not secrets.compare_digest(message["token"], self.token):
                raise ValueError("a stranger")
            peer.rank, peer.host, peer.pid = (message[k] for k in ("rank", "host", "pid"))
            self._peers[peer.rank] = peer
            return
        if "count" in message:
            if message["count"] != peer.count:
                peer.moved = peer.heard
            peer.count, peer.step, peer.phase = message["count"], message["step"], message["phase"]
        if "failed" in message:
            self._say(BROKEN_COLLECTIVE if message["broken"] else FAILED, peer.rank, f"{peer} failed: {message['failed']}")
            peer.gone = True  # that its connection closes now is no news
        elif "bye" in message:
            peer.gone = True

    def _say(self, kind: int, rank: int, words: str) -> None:
        self._said.append((kind, time.monotonic(), rank, words))

    def _patience(self) -> float:
        """How long to wait for a better reason than what has been said: a broken collective has one."""
        return GRACE if any(kind < BROKEN_COLLECTIVE for kind, *_ in self._said) else (SILENT_PULSES + 1) * self._pulse + GRACE

    def _look(self, now: float, began: float) -> None:
        """Find ranks that are silent, and ranks that stand still."""
        here = [peer for peer in self._peers.values() if not peer.gone]
        limit = min(self._timeout, SILENT_PULSES * self._pulse) if self._said else self._timeout
        for peer in here:
            if now - peer.heard > limit:
                peer.gone = True
                self._say(LOST, peer.rank, f"{peer} was lost: not a word from it for {now - peer.heard:.1f} s, so it is stopped or cut off")
        missing = sorted(set(range(self._world_size)) - set(self._peers))
        if missing and now - began > self._timeout and not self._said:
            self._say(LOST, missing[0], f"ranks {missing} never came to be watched")
        if here and not self._said and all(now - peer.moved > self._timeout for peer in here):
            least = min(peer.count for peer in here)
            behind = [peer for peer in here if peer.count == least]
            self._standstill = True
            waited = f"no rank has made progress for {self._timeout:g} s"
            if len(behind) == len(here):
                self._say(LOST, behind[0].rank, f"{waited}, and none is behind: all are at step {behind[0].step} ({behind[0].phase})")
            for peer in behind if len(behind) < len(here) else ():
                self._say(LOST, peer.rank, f"{peer} stands still: {waited}, and the others wait for it")

    def _announce(self) -> None:
        worst = min(kind for kind, *_ in self._said)
        chosen = [words for kind, _, _, words in sorted(self._said) if kind == worst]
        if worst == FAILED:  # ranks that find the same fault say it alike; the first is enough
            chosen = chosen[:1]
        verdict = "; ".join(chosen[:8]) + (f"; and {len(chosen) - 8} more" if len(chosen) > 8 else "")
        to_blame = {rank for kind, _, rank, _ in self._said if kind == LOST}
        speakers: dict[str, int] = {}  # one rank of each host says it
        for rank, peer in sorted(self._peers.items()):
            if rank not in to_blame:
                speakers.setdefault(peer.host, rank)
        if self._standstill:
            for peer in self._peers.values():
                self._tell(peer, {"show stack": 1})
            time.sleep(GRACE)  # before the first that ends breaks what the others wait in
        self._tell_all(lambda peer: {"verdict": verdict, "speaks": speakers.get(peer.host) == peer.rank})

    def _tell_all(self, message: Callable[[_Peer], dict[str, Any]]) -> None:
        """Tell all ranks something that ends their connections; rank 0 last, since this thread may end with it."""
        others = [peer for rank, peer in self._peers.items() if rank]
        for peer in others:
            self._tell(peer, message(peer))
        deadline = time.monotonic() + 2
        for peer in others:
            with contextlib.suppress(OSError):
                while time.monotonic() < deadline and peer.connection.recv(1 << 16):
                    pass
        self._tell(self._peers[0], message(self._peers[0]))

    @staticmethod
    def _tell(peer: _Peer, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            peer.connection.sendall((json.dumps(message) + "\n").encode())
