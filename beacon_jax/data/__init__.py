"""Text sources, the tiny tokenizer and random-access batches (host side, numpy)."""
