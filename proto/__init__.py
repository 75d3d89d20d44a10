"""What processes agree on: messages, links, shared-memory maps, atomics, page-table formats, run tokens, trace events, topology.

Imports nothing else of this project.
"""
