"""The paper's claims in miniature: a model of 0.3M parameters on a recall task.

data      the texts: Markov symbols, key and value pairs, questions
model     sizes of the model, and its steps: many of them per compiled call
training  the base by a curriculum, then every way to compress on the frozen base
soft      memory as input embeddings, as AutoCompressor and ICAE have it
cells     accuracy of every method, context and ratio
report    criteria, tables and a figure
"""
