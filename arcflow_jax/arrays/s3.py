"""Lets Orbax keep checkpoints on s3://. Version 0.12 knows gs:// only, and takes s3://b/run for a relative path.

What Orbax does for gs:// is right for S3 as well: a checkpoint is written in place, and gets a mark when it is
complete. Only TensorStore's description of the place differs.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

PREFIXES = ("gs://", "s3://")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # environment variables of Amazon's clients
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_gs_store, _normal_path = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
_file_size = tensorstore_utils._get_backend_ocdbt_target_data_file_size


@functools.cache
def enable() -> None:
    """Makes Orbax treat s3:// as it treats gs://."""
    gcs_utils._GCS_PATH_PREFIX = PREFIXES
    gcs_utils.get_kvstore_for_gcs = store
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(PREFIXES)
    tensorstore_utils._normalize_path = lambda path: _normal_path(path).replace("s3:/", "s3://")
    tensorstore_utils._get_backend_ocdbt_target_data_file_size = file_size


def store(path: str) -> dict[str, Any]:
    """TensorStore's description of a place in a bucket, by the environment variables of Amazon's own clients."""
    if not path.startswith("s3://"):
        return _gs_store(path)
    bucket, _, key = path.removeprefix("s3://").partition("/")
    given = {"endpoint": first(ENDPOINTS), "aws_region": first(REGIONS)}
    return {"driver": "s3", "bucket": bucket, "path": key, **{name: value for name, value in given.items() if value}}


def file_size(spec: dict[str, Any] | None) -> int:
    """The bytes of a file of weights. Each is in memory until it is uploaded: 2 GiB, as on a disk, are too many."""
    base = (spec or {}).get("base")
    in_s3 = isinstance(base, dict) and base.get("driver") == "s3"
    return tensorstore_utils._GCS_OCDBT_TARGET_DATA_FILE_SIZE if in_s3 else _file_size(spec)


def first(names: tuple[str, ...]) -> str | None:
    """The value of the first of these environment variables that is set."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
