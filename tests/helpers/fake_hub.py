"""huggingface_hub's other end: a transport that answers as the hub does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

http = sys.modules[errors.HTTPError.__module__.split(".")[0]]  # the HTTP client, whose name depends on the version
SHA = "0123456789abcdef0123456789abcdef01234567"
ID = "owner/tiny-flux"


class FakeHub:
    """Serves the files of a folder as the model `ID`; remembers which were fetched. What is uploaded lands there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fetched: list[str] = []
        self.refuse: Callable[[Any], Any] = lambda request: None

    def __call__(self, request: Any) -> Any:
        if (refusal := self.refuse(request)) is not None:
            return refusal
        path = request.url.path.replace(f"/{ID}/resolve/main/", f"/{ID}/resolve/{SHA}/")
        if request.method == "POST":
            return self.accept(path, request)
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main", f"/api/models/{ID}/revision/v1"):
            files = [{"rfilename": str(f.relative_to(self.folder))} for f in self.folder.rglob("*") if f.is_file()]
            return http.Response(200, json={"id": ID, "sha": SHA, "siblings": files}, request=request)
        if path.startswith(f"/api/models/{ID}/revision/"):
            return http.Response(404, headers={"X-Error-Code": "RevisionNotFound"}, request=request)
        if path.startswith(f"/api/models/{ID}/tree/{SHA}"):
            files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
            entries = [
                {"type": "file", "path": str(f.relative_to(self.folder)), "size": f.stat().st_size, "oid": "0" * 40}
                for f in files
            ]
            return http.Response(200, json=entries, request=request)
        if path.startswith(f"/{ID}/resolve/{SHA}/"):
            name = path.removeprefix(f"/{ID}/resolve/{SHA}/")
            data = (self.folder / name).read_bytes()
            # of the name, too: files with the same contents would be fetched once
            headers = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha256(name.encode() + data).hexdigest()}"'}
            if request.method == "HEAD":
                return http.Response(200, headers=headers | {"Content-Length": str(len(data))}, request=request)
            self.fetched.append(name)
            return http.Response(200, headers=headers, content=data, request=request)
        return http.Response(401, headers={"X-Error-Code": "RepoNotFound"}, request=request)

    def accept(self, path: str, request: Any) -> Any:
        """The steps of an upload to `ID`: the repository, the model card's metadata, how to send, and the commit."""

        def answer(content: dict[str, Any]) -> Any:
            return http.Response(200, json=content, request=request)

        page = f"https://huggingface.co/{ID}"
        if path == "/api/repos/create":
            asked = json.loads(request.content)
            assert f"{asked['organization']}/{asked['name']}" == ID
            return answer({"url": page})
        if path == "/api/validate-yaml":
            assert json.loads(request.content)["content"].startswith("---\n")
            return answer({"errors": [], "warnings": []})
        if path == f"/api/models/{ID}/preupload/main":
            files = [file["path"] for file in json.loads(request.content)["files"]]
            return answer({"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        assert path == f"/api/models/{ID}/commit/main"
        for line in map(json.loads, request.content.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                file = self.folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        return answer({"commitUrl": f"{page}/commit/{SHA}", "commitOid": SHA, "success": True})


@contextlib.contextmanager
def serving(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub is `FakeHub(folder)`, with an empty local cache."""
    fake = FakeHub(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(fake), follow_redirects=True))
    try:
        yield fake
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
