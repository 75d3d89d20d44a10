"""Reading a finished or running run: counters, trace events, summary, comparison."""
