"""One writer of an output in a bucket: whoever writes it holds a lease meanwhile, an object beside the output.

The object is made only if there is none, so of two writers one gets it. It has process id and host of its writer, and
when it was last renewed. A writer renews its lease in a thread. A lease that was not renewed for `EXPIRES` seconds, or
whose process has ended on the same host, is taken over. A container that restarts keeps its host name, and its process
keeps its id, often 1. So a process waits at an older lease with its own id, and takes it over if nobody renews it.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from typing import Any

import msgspec

from arcflow_jax.errors import UserError
from arcflow_jax.storage.bucket import BucketPath

RENEWED = 30.0  # seconds between renewals
EXPIRES = 180.0  # seconds after which nobody renews any more
STARTED = time.time()  # no lease of this process is older
SETTLED = 1.0  # seconds after which a taken lease is read again: two processes may have taken over the same one


class Holder(msgspec.Struct, frozen=True):
    """The content of a lease's object. Times are seconds since 1970."""

    process: int
    host: str
    since: float
    renewed: float

    @classmethod
    def myself(cls) -> Holder:
        """This process, from now."""
        return cls(os.getpid(), socket.gethostname(), time.time(), time.time())

    @property
    def who(self) -> tuple[int, str, float]:
        """Process id, host, and since when, for the error of a second writer."""
        return self.process, self.host, self.since

    @property
    def has_ended(self) -> bool:
        """Whether nobody holds the lease any more."""
        if time.time() - self.renewed > EXPIRES:
            return True
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class Held(Exception):
    """Another process holds the lease."""

    def __init__(self, holder: Holder | None):
        super().__init__(holder)
        self.holder = holder


@dataclasses.dataclass
class Lease:
    """A lease on an output that this process writes, once `acquire` has returned. It renews itself until `release`."""

    object: BucketPath

    def acquire(self) -> None:
        """Takes the lease. Raises Held if another process has it, and OSError."""
        self.mine = Holder.myself()
        try:
            self.write(new=True)
        except FileExistsError:
            holder = read(self.object)
            if holder is None or not (holder.has_ended or self.was_left_here(holder)):
                raise Held(holder) from None
            self.object.unlink(missing_ok=True)
            try:
                self.write(new=True)
            except FileExistsError:
                raise Held(read(self.object)) from None
            time.sleep(SETTLED)
            if not self.is_mine():
                raise Held(read(self.object)) from None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.renew, daemon=True)
        self.thread.start()

    def was_left_here(self, holder: Holder) -> bool:
        """Whether this container took the lease before it restarted. Waits: another process would renew it."""
        if (holder.process, holder.host) != (os.getpid(), socket.gethostname()) or holder.since >= STARTED:
            return False
        print(f"waiting {1.5 * RENEWED:g} s, to see whether {self.object} is renewed", flush=True)
        time.sleep(1.5 * RENEWED)
        return read(self.object) == holder

    def write(self, new: bool = False) -> None:
        self.object.write_bytes(msgspec.json.encode(self.mine), new=new)

    def is_mine(self) -> bool:
        """Whether this process still has the lease. After a suspension, another one may have taken it over."""
        now = read(self.object)
        return now is not None and now.who == self.mine.who

    def renew(self) -> None:
        """Renews the lease until it is released, or another process has taken it over.

        A renewal that fails is tried again: the lease lasts longer.
        """
        while not self.ended.wait(RENEWED):
            try:
                if not self.is_mine():
                    print(f"{self.object} was not renewed in time: another process may write there now", flush=True)
                    return
                self.mine = msgspec.structs.replace(self.mine, renewed=time.time())
                self.write()
            except (OSError, UserError) as error:
                print(f"could not renew {self.object}: {error}", flush=True)

    def release(self) -> None:
        """Gives the lease back, unless another process has taken it over."""
        self.ended.set()
        self.thread.join()
        if self.is_mine():
            self.object.unlink(missing_ok=True)


def read(path: BucketPath) -> Holder | None:
    """Who holds a lease; None if there is none, or something else is there."""
    try:
        return msgspec.json.decode(path.read_bytes(0, 4096), type=Holder)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


leases: dict[tuple[str, int], tuple[Lease, int]] = {}  # of this process, by output and thread, and how often it is held


def acquire(path: BucketPath) -> Any:
    """Takes the lease of an output, or takes it once more; returns what releases it. Raises Held and OSError."""
    key = str(path), threading.get_ident()
    lease, times = leases.get(key, (Lease(path), 0))
    if not times:
        lease.acquire()
    leases[key] = lease, times + 1

    def release() -> None:
        lease, times = leases.pop(key)
        if times > 1:
            leases[key] = lease, times - 1
        else:
            lease.release()

    return release
