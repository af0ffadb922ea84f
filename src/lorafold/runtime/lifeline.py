"""Tells the processes of a run that one of them failed or died, whatever they are computing.

Each process has a connection to process 0 for as long as it lives. The system closes it when the
process dies, and probes it where the whole machine is gone, so that nothing is taken for dead
because it computes for long. Process 0 then says which process it was, in one line, and all end; if
it is process 0, process 1 says so. A process that fails tells process 0 why, and waits for it to
print that: a launcher that sees one process end may kill the others before they could.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Protocol, TextIO

PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # gone after 20 seconds
GRACE = 2.0  # seconds in which process 0 may find the same mistake as another
LAST = 15.0  # seconds that a process waits for process 0 to have ended


class Store(Protocol):
    """What all processes read and write: torch's."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Wait until there is a value, and read it."""


class Lifeline:
    """The connections of one process; `place` says what it is at, for the line about another's
    death.
    """

    def __init__(self, rank: int, world: int, address: str, store: Store) -> None:
        self.rank, self.host = rank, socket.gethostname()
        self.place: Callable[[], str] = lambda: "at the start"
        self._lock = threading.Lock()
        self._over, self._gone = threading.Event(), threading.Event()  # here, process 0
        self._code: int | None = None  # with which process 0 ends
        self._left = set[int]()  # those that are done
        self._peers: dict[int, socket.socket] = {}
        self._heard: dict[int, TextIO] = {}
        self._hosts: dict[int, str] = {}
        if rank == 0:
            self._accept(world, address, store)
        else:
            self._reach(address, store)
        os.register_at_fork(after_in_child=self._forget)  # a child would keep them open
        for peer in self._peers:
            threading.Thread(target=self._hear, args=(peer,), name="lifeline", daemon=True).start()

    def _accept(self, world: int, address: str, store: Store) -> None:
        token = secrets.token_hex(16)
        where = "127.0.0.1" if address in ("127.0.0.1", "localhost") else ""
        with socket.create_server((where, 0), backlog=world) as server:
            store.set("lifeline", f"{server.getsockname()[1]} {token} {self.host}")
            while len(self._peers) < world - 1:
                peer, _ = server.accept()
                with suppress(ValueError, KeyError, OSError):  # a stranger
                    peer.settimeout(LAST)
                    heard = peer.makefile()
                    hello = json.loads(heard.readline())
                    if hello["token"] == token:
                        self._add(hello["rank"], hello["host"], peer, heard)

    def _reach(self, address: str, store: Store) -> None:
        port, token, host = store.get("lifeline").decode().split(" ", 2)
        first = socket.create_connection((address, int(port)), LAST)
        self._add(0, host, first, first.makefile())
        self._tell(0, token=token, rank=self.rank, host=self.host)

    def _add(self, rank: int, host: str, peer: socket.socket, heard: TextIO) -> None:
        self._peers[rank], self._hosts[rank], self._heard[rank] = peer, host, heard
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if (option := getattr(socket, name, None)) is not None:
                peer.setsockopt(socket.IPPROTO_TCP, option, value)

    def failed(self, code: int, told: str) -> None:
        """Say that this process ends with an error, and let process 0 print before others end."""
        self._over.set()
        if self.rank == 0:
            with self._lock:
                self._end_others(code)
            return
        if threading.current_thread() is threading.main_thread():
            # of a launcher that saw process 0 end
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
        self._tell(0, failed=code, told=told)
        self._gone.wait(LAST)

    def wait(self, seconds: float) -> None:
        """Wait for what the connections tell, which may end this process."""
        self._over.wait(seconds)

    def left(self) -> None:
        """Say that this process is done."""
        self._over.set()
        for peer in self._peers:
            self._tell(peer, left=True)

    def _hear(self, peer: int) -> None:
        with suppress(OSError):
            for line in self._heard[peer]:
                said = json.loads(line)
                if "left" in said:
                    self._left.add(peer)
                elif "over" in said:
                    self._code = said["over"]
                    self._peers[peer].settimeout(LAST)
                elif not self._over.wait(GRACE):
                    told = f"process {peer} on {self._hosts[peer]}: {said['told']}"
                    self._end(said["failed"], told)
        if peer == 0:
            self._gone.set()
        if peer in self._left or self._over.is_set():
            return
        if self._code is not None:
            os._exit(self._code)
        how = "it said nothing: killed, perhaps for its memory"
        told = f"process {peer} on {self._hosts[peer]} died {self.place()}; {how}"
        self._end(1, told if self.rank <= 1 else "")

    def _end(self, code: int, told: str) -> NoReturn:
        with self._lock:
            if told:
                print(f"error: {told}", file=sys.__stderr__, flush=True)
            self._end_others(code)
            os._exit(code)

    def _end_others(self, code: int) -> None:
        if self.rank == 0:
            for peer in self._peers:
                self._tell(peer, over=code)

    def _tell(self, peer: int, **said: Any) -> None:
        with suppress(OSError):
            self._peers[peer].sendall(json.dumps(said).encode() + b"\n")

    def _forget(self) -> None:
        for peer in self._peers.values():
            peer.close()

