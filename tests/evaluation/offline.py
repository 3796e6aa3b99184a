"""What the tests of the generated tasks share: a text, tokenizers, their examples."""

import dataclasses

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beacon_jax.evaluation.tasks import make_tasks

# Prose with sentences of different lengths, without any needle in it.
PARTS = (
    "The river runs past the stone mill",
    "Rain fell",
    "Nobody in the village knew",
)
PROSE = " ".join(f"{PARTS[i * i % 7 % 3]} {i % 11} times." for i in range(200))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer():
    """One token per byte, and the digits and spaces as they come."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    )


def text_of(model, example):
    return model.tokenizer.decode(example.tokens.tolist())


def examples(name, wanted, **changes):
    model, settings, inputs = wanted
    changed = dataclasses.replace(settings, **changes)
    return make_tasks([name])[0].examples(model, changed, inputs)
