"""Turns sources of text and conversations into batches of windows (on host, numpy)."""

import os

# Without it transformers prints, on import, that PyTorch is not there.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
