"""Feeds damaged files to what reads files: `python -m tests.fuzz --count=2000`."""
