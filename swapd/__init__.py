"""The swap daemon: slots of 4096 bytes in a real file, read and written in parallel straight from and into
shared frames.
"""
