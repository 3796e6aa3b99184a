"""Text from a model: prefill, decoding, sampling, and the model handle.

`prefill` and `decode` are pure functions of (variables, inputs, memory) -> (outputs,
memory); `model.Model` puts a tokenizer in front of them.
"""
