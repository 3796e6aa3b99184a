"""GGUF files: what their headers say, and the tokenizer in them."""
