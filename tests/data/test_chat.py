"""Chat templates and their label masks: by decoding, and as the release counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.data import chat
from tests.data import chat_tokenizers as tiny

TOKENIZERS = {
    "qwen": tiny.qwen,
    "llama-3": tiny.llama_3,
    "llama-2": tiny.llama_2,
    "mistral": tiny.mistral,
}
TALK = (
    ("user", "What is this?"),
    ("assistant", "A text wrapper."),
    ("user", "Why does it break\n\nlong words?"),
    ("assistant", "Because it is told to.\n  It need not."),
)
TEXTS = {
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    "llama-2": "[INST] Q1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s><s>",
    "mistral": "[INST] Q1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>",
}
# What the labelled tokens of TALK decode to: answers and end markers, nothing else.
LABELLED = {
    "qwen": "A text wrapper.<|im_end|>Because it is told to.\n  It need not.<|im_end|>",
    "llama-3": "A text wrapper.<|eot_id|>"
    "Because it is told to.\n  It need not.<|eot_id|>",
    "llama-2": "A text wrapper. </s> Because it is told to.\n  It need not. </s>",
    "mistral": "A text wrapper.</s> Because it is told to.\n  It need not.</s>",
}
# How the release divides a text to count tokens: (turns, question from answer, tokens
# of bos, by how much the masked part reaches back in front of a turn).
SEPARATORS = {
    "qwen": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", 0, 4),
    "llama-3": (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        1,
        4,
    ),
    "llama-2": (" </s><s>", " [/INST]", 1, 1),
    "mistral": ("</s>", " [/INST]", 1, 0),
}
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
names = pytest.mark.parametrize("name", TOKENIZERS)


def encode(turns, tokenizer, template):
    made = chat.encode(turns, tokenizer, template)
    assert not isinstance(made, str), made
    return made


def decode(tokens, tokenizer):
    return tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)


def counted(turns, tokenizer, template):
    """Labels by the release's rule: counts of pieces, each tokenised alone."""

    def count(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    between_turns, between_roles, bos, back = SEPARATORS[template]
    text, _ = chat.render(turns, template)
    labelled = np.ones(len(tokenizer(text)["input_ids"]), bool)
    at = 0
    for number, turn in enumerate(text.split(between_turns)):
        if not turn:
            break
        length, masked = count(turn), count(turn) + count(between_turns)
        if turn.count(between_roles) == 1:
            masked = count(turn[: turn.index(between_roles) + len(between_roles)])
            length, masked = (n + bos * (number == 0) for n in (length, masked))
        labelled[max(0, at - back) : at + masked] = False
        at += length + count(between_turns)
    labelled[max(0, at - back) :] = False
    return labelled


@names
def test_text_of_a_conversation_is_that_of_the_release(name):
    turns = [(r, f"{r[0].upper()}".replace("U", "Q")) for r, _ in TALK]
    turns = [(r, c + str(i // 2 + 1)) for i, (r, c) in enumerate(turns)]
    text, _ = chat.render(turns, name)
    assert text == TEXTS[name]
    tokens, _ = encode(turns, TOKENIZERS[name](), name)
    assert list(tokens) == TOKENIZERS[name]()(text)["input_ids"]


@names
def test_labelled_tokens_decode_to_answers_and_their_end_markers(name):
    tokenizer = TOKENIZERS[name]()
    tokens, labelled = encode(TALK, tokenizer, name)
    assert tokens.dtype == np.int32 and labelled.dtype == bool
    got = decode(tokens[labelled], tokenizer)
    assert got.lstrip() == LABELLED[name]
    assert not labelled[0]


@names
@pytest.mark.parametrize("turns", [TALK, TALK[:2], TALK[:3]])
def test_mask_is_what_counting_pieces_as_the_release_does_gives(name, turns):
    tokenizer = TOKENIZERS[name]()
    _, labelled = encode(turns, tokenizer, name)
    np.testing.assert_array_equal(labelled, counted(turns, tokenizer, name))


words = st.lists(
    st.sampled_from(
        ["wrap", "the", "é", "漢字", "a  b", "x\ny", "(1.5)", "😀", "it's"]
    ),
    min_size=1,
    max_size=6,
).map(" ".join)


@names
@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4), open_end=words)
def test_masks_agree_with_counting_on_any_words(name, pairs, open_end):
    tokenizer = TOKENIZERS[name]()
    turns = [
        t for q, a in pairs for t in (("user", q.replace("\n", " ")), ("assistant", a))
    ]
    for talk in (turns, [*turns, ("user", open_end)]):
        _, labelled = encode(talk, tokenizer, name)
        np.testing.assert_array_equal(labelled, counted(talk, tokenizer, name))


@names
@settings(max_examples=100, deadline=None)
@given(
    question=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
    ),
    answer=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
    ),
)
def test_masks_of_any_text_cover_the_answer_and_nothing_else(name, question, answer):
    tokenizer = TOKENIZERS[name]()
    turns = [("user", question), ("assistant", answer)]
    text, [(start, stop)] = chat.render(turns, name)
    tokens, labelled = encode(turns, tokenizer, name)
    # One run of tokens, up to and with the end marker, ...
    at = np.flatnonzero(labelled)
    assert (np.diff(at) == 1).all()
    marker = {"qwen": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(name, "</s>")
    assert tokens[at[-1]] == tokenizer.convert_tokens_to_ids(marker)
    # ... behind the tokens of all that comes first, tokenised as far as the answer, ...
    assert text[start:stop].endswith(answer + {"llama-2": " </s>"}.get(name, marker))
    head = tokenizer(text[:start])["input_ids"]
    if name in ("llama-2", "mistral") or answer[0].isalnum():
        assert at[0] == len(head) and list(tokens[: at[0]]) == head
    else:  # the answer's first spaces may belong to a token of the header
        assert len(head) - 1 <= at[0] <= len(head)
    # ... and nothing behind it but what the template adds.
    tail = {"qwen": "\n", "llama-2": "<s>"}.get(name, "")
    assert decode(tokens[at[-1] + 1 :], tokenizer) == tail


def test_token_that_begins_in_front_of_the_answer_is_no_target():
    """Qwen and Llama-3 join newlines: the header's and the answer's are one token."""
    tokenizer = tiny.qwen()
    turns = [("user", "wrap"), ("assistant", "\nwrap")]
    tokens, labelled = encode(turns, tokenizer, "qwen")
    assert decode(tokens[labelled], tokenizer) == "wrap<|im_end|>"
    assert decode(tokens[: np.argmax(labelled)], tokenizer).endswith("assistant\n\n")
    np.testing.assert_array_equal(labelled, counted(turns, tokenizer, "qwen"))


def test_question_that_begins_with_a_newline_does_not_shift_the_mask():
    """The release counts that newline twice and loses the answer's first token."""
    tokenizer = tiny.qwen()
    turns = [("user", "\nwrap it"), ("assistant", "wrap it")]
    tokens, labelled = encode(turns, tokenizer, "qwen")
    assert decode(tokens[labelled], tokenizer) == "wrap it<|im_end|>"
    release = counted(turns, tokenizer, "qwen")
    assert decode(tokens[release], tokenizer) != "wrap it<|im_end|>"


def test_markers_inside_a_question_do_not_make_it_an_answer():
    tokenizer = tiny.qwen()
    trick = "x<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\ny"
    tokens, labelled = encode(
        [("user", trick), ("assistant", "wrap")], tokenizer, "qwen"
    )
    assert decode(tokens[labelled], tokenizer) == "wrap<|im_end|>"


@names
def test_turns_in_front_of_the_first_question_are_left_out(name):
    tokenizer = TOKENIZERS[name]()
    led = [("system", "Be brief."), ("assistant", "Hello."), *TALK]
    for one, other in zip(
        encode(led, tokenizer, name), encode(TALK, tokenizer, name), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("turns", "template", "reason"),
    [
        (TALK[:1], "qwen", chat.NO_ASSISTANT),
        ([("system", "s"), ("assistant", "a")], "qwen", chat.NO_ASSISTANT),
        ([], "qwen", chat.NO_ASSISTANT),
        ([*TALK[:2], TALK[1]], "qwen", chat.SAME_ROLE),
        ([TALK[0], TALK[0], TALK[1]], "no", chat.SAME_ROLE),
        ([("user", ""), TALK[1]], "qwen", chat.EMPTY_TURN),
        ([TALK[0], ("system", "s"), TALK[1]], "qwen", chat.UNKNOWN_ROLE),
        ([TALK[0], ("tool", "s"), TALK[1]], "qwen", chat.UNKNOWN_ROLE),
        (TALK, "no", chat.MULTI_TURN),
    ],
)
def test_conversation_that_cannot_be_written_has_a_reason(turns, template, reason):
    found = chat.encode(turns, tiny.qwen(), template)
    assert isinstance(found, str) and found.partition(":")[0] == reason
    assert reason in chat.REASONS


def test_turns_in_front_of_the_users_are_named_and_hf_writes_those_of_the_system():
    tokenizer = with_template(MARKED)
    talk = [("assistant", "Hello."), ("system", "Be brief."), *TALK[:2]]
    tokens, labelled = encode(talk, tokenizer, "hf")
    assert "system\nBe brief.<|im_end|>" in decode(tokens[~labelled], tokenizer)
    assert "Hello." not in decode(tokens, tokenizer)
    front = "turns in front of the user's (chat_template={})"
    assert chat.not_written(talk, "hf") == [f"assistant {front.format('hf')}"]
    assert chat.not_written(talk, "qwen") == [
        f"{role} {front.format('qwen')}" for role in ("assistant", "system")
    ]
    assert chat.not_written([("system", " "), *TALK], "qwen") == []
    called = [TALK[0], ("tool", "21 degrees"), TALK[1]]
    tokens, labelled = encode(called, tokenizer, "hf")
    assert "tool\n21 degrees" in decode(tokens[~labelled], tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_template_no_labels_the_answer_and_eos(name):
    tokenizer = TOKENIZERS[name]()
    turns = [("user", "wrap  the text"), ("assistant", "wrap it")]
    tokens, labelled = encode(turns, tokenizer, "no")
    eos = tokenizer.eos_token
    assert list(tokens) == tokenizer(f"wrap  the text wrap it{eos}")["input_ids"]
    # The first token of the answer holds the space in front of it (" wrap").
    assert decode(tokens[labelled], tokenizer).lstrip() == f"wrap it{eos}"
    # The release counts the answer's tokens alone, from the end.
    alone = len(tokenizer(f"wrap it{eos}", add_special_tokens=False)["input_ids"])
    if name in ("llama-2", "mistral"):  # elsewhere "wrap" alone is two tokens
        assert labelled.sum() == alone and labelled[-alone:].all()


def with_template(template):
    tokenizer = tiny.qwen.__wrapped__()
    tokenizer.chat_template = template
    return tokenizer


def test_own_template_with_marks_labels_what_it_marks():
    tokenizer = with_template(MARKED)
    tokens, labelled = encode(TALK, tokenizer, "hf")
    assert decode(tokens[labelled], tokenizer) == LABELLED["qwen"]
    messages = [{"role": r, "content": c} for r, c in TALK]
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(tokens) == theirs["input_ids"]
    assert list(labelled) == [m == 1 for m in theirs["assistant_masks"]]


def test_own_template_marks_answers_that_begin_with_spaces():
    """transformers' mask stops at one if the tokenizer trims its offsets (Llama-3)."""
    tokenizer = tiny.llama_3.__wrapped__()
    tokenizer.chat_template = MARKED.replace("<|im_start|>", "<|start_header_id|>")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>", "<|eot_id|>"
    )
    turns = [TALK[0], ("assistant", "  wrap  "), *TALK[2:]]
    tokens, labelled = encode(turns, tokenizer, "hf")
    got = decode(tokens[labelled], tokenizer)
    assert got == "  wrap  <|eot_id|>" + LABELLED["llama-3"].partition("<|eot_id|>")[2]


def test_own_template_without_marks_is_an_error_that_says_so():
    bare = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match=r"tiny-qwen.*\{% generation %\}"):
        chat.encode(TALK, with_template(bare), "hf")
    with pytest.raises(ValueError, match="has no chat template"):
        chat.encode(TALK, tiny.qwen(), "hf")


def test_conversation_that_its_own_template_refuses_is_dropped(caplog):
    refusing = "{{ raise_exception('no thanks') }}" + MARKED
    assert chat.encode(TALK, with_template(refusing), "hf") == chat.REFUSED
    assert "no thanks" in caplog.text


def test_own_template_that_divides_by_zero_is_dropped(caplog):
    assert chat.encode(TALK, with_template(MARKED + "{{ 1 / 0 }}"), "hf") == (
        chat.REFUSED
    )
    assert "division by zero" in caplog.text


def test_own_template_that_is_no_jinja_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"is no jinja template: .*\(line 1\)\. Mend"):
        chat.encode(TALK, with_template("{% for %}{% generation %}"), "hf")


def test_template_of_another_model_names_what_is_missing():
    with pytest.raises(
        ValueError, match=r"'llama-3' needs <\|start_header_id\|>.*qwen"
    ):
        chat.encode(TALK, tiny.qwen(), "llama-3")
    with pytest.raises(ValueError, match=r"'qwen' needs.*tiny-llama-2"):
        chat.encode(TALK, tiny.llama_2(), "qwen")


def test_conversation_without_a_template_is_an_error_that_names_the_setting():
    for template in ("", "vicuna"):
        with pytest.raises(ValueError, match=r"data\.chat_template.*qwen, llama-3"):
            chat.encode(TALK, tiny.qwen(), template)
