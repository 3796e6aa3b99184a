"""Speed and memory: attention, prefill, decoding and training steps (`bench.py`)."""
