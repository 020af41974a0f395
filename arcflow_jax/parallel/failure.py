"""If one process of a run fails or dies, the others end as well, and say why.

Without this they would wait in a collective for a process that is gone. A process that fails leaves the reason in the
key-value store that `jax.distributed` has, where a thread of each other process looks for it. Of a process that was
killed, JAX misses the heartbeats, or the connection if it was the first process. Then JAX aborts the others.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax._src import distributed  # its key-value store has no public name

from arcflow_jax.errors import Preempted, UserError, exit_code, one_line
from arcflow_jax.parallel.processes import several
from arcflow_jax.storage.lock import abandon

GRACE = 10  # seconds in which a process may end by itself after a failure, its own or another's
FAILED, SEEN = "arcflow_jax/failed", "arcflow_jax/seen"  # keys of the store: the first failure; who knows of one
LOST = "another process of this run was killed or cannot be reached"
# How a broken connection shows in an exception: of a collective, or of a barrier
BROKEN = ("Gloo", "NCCL", "Barrier", "heartbeat")
# And how any network's does. A UserError says itself which: that of a bucket, or of the hub
BROKEN_ANYWHERE = ("Connection reset", "closed by peer", "Broken pipe", "UNAVAILABLE")
ABORT = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Failure:
    """What this process knows of the failure that ends the run."""

    def __init__(self) -> None:
        self.client = distributed.global_state.client
        self.reason: str | None = None  # of another process
        self.code = 1  # that this process ends with
        self.own = False  # whether this process has failed itself
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.handler = ABORT(self.aborted)

    def tell(self, error: BaseException) -> None:
        """Tells the other processes of an exception in this one, which ends with its exit code."""
        if self.own:
            return
        reason, code = self.look(), exit_code(error)
        if reason is None or code != 1:  # 1 may be a consequence
            self.code = code
        self.own = True
        atexit.register(self.leave)  # before JAX's own, which waits for all processes
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            return
        text = f"{type(error).__name__}: {one_line(error)}"
        signs = BROKEN if isinstance(error, UserError) else BROKEN + BROKEN_ANYWHERE
        if any(sign in text for sign in signs):
            print(f"error: {LOST}: {text}", file=sys.stderr, flush=True)
        who = f"process {jax.process_index()} on {socket.gethostname()}"
        with contextlib.suppress(Exception):  # another has told first, or the connection is gone
            self.client.key_value_set(FAILED, json.dumps({"text": f"{who} failed: {text}", "code": self.code}))
        self.acknowledge()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tells of an exception in the `with` block, and raises it."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Preempted):  # as all processes are
                self.tell(error)
            raise

    def look(self) -> str | None:
        """The failure that another process has told of."""
        if self.reason is None:
            with contextlib.suppress(Exception):  # there is none, or the connection is gone
                failed = json.loads(self.client.key_value_try_get(FAILED))
                self.reason, self.code = failed["text"], failed["code"]
                self.acknowledge()
        return self.reason

    def acknowledge(self) -> None:
        """Tells the first process that this one knows of a failure, its own or another's. It waits for that."""
        with contextlib.suppress(Exception):  # told before, or the connection is gone
            self.client.key_value_set(f"{SEEN}/{jax.process_index()}", "")

    def watch(self) -> None:
        """Ends this process if it does not end by itself after a failure. Runs in a thread."""
        while not self.over.wait(1):
            if self.own or self.look() is not None:
                # A library's exit may wait for the others, too
                if not self.over.wait(2 * GRACE if self.own else GRACE):
                    self.end()
                return

    def aborted(self, number: int) -> NoReturn:
        """JAX calls abort() once it has written on stderr that a process is dead. Runs in any thread."""
        self.end()

    def end(self) -> NoReturn:
        """Ends this process now."""
        if not self.own:
            with contextlib.suppress(OSError):
                os.write(2, f"error: {self.reason or LOST}; process {jax.process_index()} ends, too\n".encode())
        abandon()
        os._exit(self.code)

    def leave(self) -> NoReturn:
        """Ends this process without JAX's shutdown, in which it would wait for the others."""
        end = time.monotonic() + GRACE
        with contextlib.suppress(Exception):
            # The store is in the first process, which therefore stays until all know
            while jax.process_index() == 0 and time.monotonic() < end:
                if len(self.client.key_value_dir_get(SEEN)) == jax.process_count():
                    break
                time.sleep(0.2)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code)


_run: Failure | None = None


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
    """Inside the `with` block, an exception in one process ends all of them, and so does the death of one.

    The exit code of all is that of the exception, see `errors.exit_code`; it is 1 if a process was killed. Blocks may
    be nested: the others are told at the end of the inner one. With one process only this does nothing.
    """
    global _run
    failure = _run
    if not several():
        yield
    elif failure is not None:
        with failure.telling():
            yield
    else:
        failure = _run = Failure()
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        # Python's own handlers run later, in the main thread. abort() does not wait for that
        before = libc.signal(signal.SIGABRT, failure.handler)
        failure.watcher.start()
        try:
            with failure.telling():
                yield
        finally:
            if not failure.own:
                failure.over.set()
                libc.signal(signal.SIGABRT, ctypes.c_void_p(before))
                _run = None
