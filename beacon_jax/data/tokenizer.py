"""The tokenizer of the tiny base model: byte-level BPE, digits one by one.

It is written as an ordinary Hugging Face folder (tokenizer.json,
tokenizer_config.json), so that `transformers.AutoTokenizer` and everything else loads
it like any other.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from beacon_jax.data.chat import eos_of
from beacon_jax.data.passkey import NEEDLE, QUESTION, draw_key
from beacon_jax.resources import save_tokenizer
from beacon_jax.tokenise import encode_all

# One token separates documents and is both bos and eos: beacons start from its
# embedding row (docs/specification.md section 1), so it has to be a row that base
# training really uses.
EOS = "<|endoftext|>"
PAD = "<|pad|>"

SMALLEST_VOCABULARY = 259  # 256 bytes, 2 specials and a merge


def train_tokenizer(
    documents: Sequence[str],
    folder: str | Path,
    vocab_size: int = 512,
    passkey_fraction: float = 0.03,
    seed: int = 0,
) -> Any:
    """Trains on the documents, saves to `folder`, returns the loaded fast tokenizer.

    Digits are tokens of their own, so that a 5-digit key is 5 tokens wherever it
    stands. Passkey sentences make up `passkey_fraction` of the training characters.
    With none a needle takes 39 tokens and a question 26. With 0.03 they take 30 and 19
    (vocab 512, standard library), so that either fits a window of 32; other text costs
    the same.

    Raises:
      ValueError: vocab_size leaves no merges above the 256 bytes and 2 special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {SMALLEST_VOCABULARY} (256 "
            "bytes, 2 specials)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = np.random.default_rng(seed)
    size = passkey_fraction * sum(map(len, documents))
    sentence = NEEDLE + QUESTION
    phrases = [
        sentence.format(key=draw_key(rng)) for _ in range(int(size / len(sentence)))
    ]
    tokenizer.train_from_iterator([*documents, *phrases], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(fast, folder)
    return fast


def ensure_tokenizer(
    config: Any, documents: Callable[[], Sequence[str]], workdir: Path
) -> Path:
    """Trains the tokenizer of a run once and returns its folder.

    The folder is `tokenizer` in the workdir of the run.

    Args:
      config: a whole config; its `tokenizer` and `seed` count.
      documents: gives the texts, if there is no tokenizer yet.
    """
    folder, settings = workdir / "tokenizer", config.tokenizer
    if not (folder / "tokenizer_config.json").exists():
        partial = workdir / "tokenizer.partial"  # a kill must not leave half of one
        shutil.rmtree(partial, ignore_errors=True)
        train_tokenizer(
            documents(),
            partial,
            vocab_size=settings.vocab_size,
            passkey_fraction=settings.passkey_fraction,
            seed=config.seed,
        )
        partial.rename(folder)
    return folder


def encode_stream(documents: Sequence[str], tokenizer: Any) -> np.ndarray:
    """Returns all documents as one int32 stream [n], each followed by eos."""
    eos = eos_of(tokenizer)
    rows = encode_all(tokenizer, documents)
    return np.concatenate([np.asarray([*row, eos], np.int32) for row in rows])
