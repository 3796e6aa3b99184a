"""From sources of text and conversations to batches of windows (host side, numpy)."""

import os

# Without it transformers prints, on import, that PyTorch is not there.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
