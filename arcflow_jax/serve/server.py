"""Listening, and ending in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Sequence

import uvicorn

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.serve.api import Door
from arcflow_jax.serve.engine import Engine

LOOK = 0.1  # seconds between two looks at the engine
FLUSH = 1.0  # seconds that the last answers have to leave; a page that is open never leaves by itself
LAST = 10.0  # seconds for the batch that runs when the grace time is over


def serve(door: Door, engines: Sequence[Engine], *, host: str, port: int, grace: int) -> bool:
    """Serves until SIGTERM or Ctrl-C. Then it takes no more requests, and gives those that wait their images.

    Args:
      port: 0 takes a free one.
      grace: seconds that the waiting requests have at the end.

    Returns:
      whether all of them got their answers in time.

    Raises:
      UserError: if the address is taken, or the devices run out of memory while programs are compiled.
    """
    config = uvicorn.Config(
        door, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace
    )
    server = uvicorn.Server(config)

    def end(number: int, frame: object) -> None:
        server.should_exit = True

    with listening(host, port) as listener:
        # uvicorn sends itself the signal again when it has ended
        previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return asyncio.run(until_the_end(server, listener, door, engines))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError."""
    if not host:  # which Python takes for all addresses of the machine
        raise UserError("the host is empty: 127.0.0.1 is for this machine only, 0.0.0.0 for all that reach it")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {one_line(host)}, port {port}: {one_line(error)}") from None


async def until_the_end(server: uvicorn.Server, listener: socket.socket, door: Door, engines: Sequence[Engine]) -> bool:
    """Runs server and engines. Returns whether all requests got their answers."""
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"compiling; {address}/health tells when it is done", flush=True)
    for engine in engines:
        engine.start()
    clock, told = asyncio.get_running_loop().time, False
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.should_exit and not serving.done():
        if any(engine.failure for engine in engines):
            server.should_exit = True
        elif all(engine.ready for engine in engines) and not told:
            print(f"serving on {address}", flush=True)
            told = True
        await asyncio.sleep(LOOK)
    end = clock() + server.config.timeout_graceful_shutdown
    for engine in engines:
        engine.close()
    print(f"stopping: {door.active} requests get their answers first", flush=True)
    while door.active and clock() < end:
        await asyncio.sleep(LOOK)
    complete = not door.active
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(serving), FLUSH)
    for connection in list(server.server_state.connections):
        connection.transport.close()
    await serving
    for engine in engines:
        await asyncio.to_thread(engine.stop, LAST)
        if engine.failure is not None:
            raise engine.failure
    return complete
