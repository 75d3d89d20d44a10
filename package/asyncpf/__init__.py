"""The installed form of asyncpf: the command `asyncpf`, and the checkout's folders under `_app`.

The folders keep their short names (proto, host, ...) inside `_app`, which is put on sys.path only in the
processes of asyncpf itself: as top-level packages they would clash with other distributions.
"""
