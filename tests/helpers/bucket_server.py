"""Emulators of the two object stores on 127.0.0.1: `python -m tests.helpers.bucket_server gs|s3 PORT [FAULTS]`.

For gs:// it is gcp-storage-emulator, with what it lacks: conditional requests, the generation of what is read, and
/served, the bytes that it has served of each object. For s3:// it is moto. Both have one bucket, `bucket`.

FAULTS is "busy": every third request is answered with 503; "denied": all with 403; "sealed", gs:// only: TensorStore's
writes with 403.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

HOST, BUCKET = "127.0.0.1", "bucket"
BUSY = {"error": {"code": 503, "message": "We encountered an internal error. Please try again."}}
DENIED = {"error": {"code": 403, "message": "somebody@example.com does not have storage.objects.get access."}}
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


class Faults:
    """Says for each request whether it fails."""

    def __init__(self, kind: str):
        self.kind, self.requests = kind, 0

    def __call__(self, request: str = "") -> int:
        """The status of a failure, 0 for none."""
        self.requests += 1
        sealed = request.startswith("POST") and "ocdbt" in request
        failures = {"denied": 403, "busy": 503 * (self.requests % 3 == 0), "sealed": 403 * sealed}
        return failures.get(self.kind, 0)


def generation(request: Any, storage: Any) -> str:
    """The generation of the object that a request is about, "0" if there is none."""
    from gcp_storage_emulator.exceptions import NotFound

    name = request.params.get("object_id") or request.query.get("name", [None])[0]
    if name is None and isinstance(request.data, dict):
        name = request.data.get("name") or request.data.get("meta", {}).get("name")
    try:
        return str(storage.get_file_obj(request.params["bucket_name"], name)["generation"])
    except NotFound:
        return "0"


def mended(handler: Callable, faults: Faults, served: Counter[str]) -> Callable:
    """A handler of the emulator, with faults, conditions, generations, and a count of the bytes served."""

    def handle(request: Any, response: Any, storage: Any) -> None:
        body = request.data  # read in any case, or the client cannot send it
        if status := faults(f"{request.method} {request.full_url}"):
            response.status = HTTPStatus(status)
            response.json(DENIED if status == 403 else BUSY)
            return
        there = None
        if "bucket_name" in (request.params or {}) and not isinstance(body, list):
            there = generation(request, storage)
            if request.query.get("ifGenerationMatch", [there])[0] != there:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            if request.query.get("ifGenerationNotMatch", [None])[0] == there:
                response.status = HTTPStatus.NOT_MODIFIED
                return
        handler(request, response, storage)
        if there is not None and request.query.get("alt") == ["media"]:
            response["x-goog-generation"] = there
            served[request.params["object_id"]] += len(response._content)

    return handle


def serve_gs(port: int, faults: Faults) -> None:
    from gcp_storage_emulator import server

    served: Counter[str] = Counter()
    server.HANDLERS = (
        ("^/served$", {"GET": lambda request, response, storage: response.json(served)}),
        *(
            (path, {method: mended(handler, faults, served) for method, handler in handlers.items()})
            for path, handlers in server.HANDLERS
        ),
    )
    in_memory = "STORAGE_BASE" not in os.environ  # the emulator's own name of a folder for the objects
    server.create_server(HOST, port, in_memory=in_memory, default_bucket=BUCKET).start()


def serve_s3(port: int, faults: Faults) -> None:
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    backend = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        if status := faults():
            code, message = (
                ("AccessDenied", "Access Denied") if status == 403 else ("SlowDown", "Please reduce your rate")
            )
            start(f"{status} {code}", [("Content-Type", "application/xml")])
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [ERROR.format(code, message).encode()]
        return backend(environ, start)

    kind, faults.kind = faults.kind, ""
    server = make_server(HOST, port, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    boto3.client("s3", endpoint_url=f"http://{HOST}:{port}").create_bucket(Bucket=BUCKET)
    faults.kind = kind


def main() -> None:
    scheme, port, *kind = sys.argv[1:]
    {"gs": serve_gs, "s3": serve_s3}[scheme](int(port), Faults(*kind or [""]))
    print(json.dumps("ready"), flush=True)
    sys.stdin.read()  # until the test closes it


if __name__ == "__main__":
    main()
