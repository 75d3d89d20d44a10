"""The command line: checks the request, starts and watches the processes, records traces, reports the end.

`bootstrap`, `kernel_cache`, `options` and `cli` import the standard library only: they run before the
dependencies are there.
"""
