"""Arrays on disk and in buckets, by Orbax and TensorStore.

`orbax` is how Orbax reads and writes our arrays, `writer` streams arrays that are larger than memory, `replicas` reads
each array once for all processes. `s3` and `log` adapt Orbax. May import storage and what lies below it.
"""
