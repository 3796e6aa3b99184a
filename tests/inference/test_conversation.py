"""Conversations over a memory: a turn feeds what is new, and equals feeding it all."""

import copy
import dataclasses
import re

import numpy as np
import pytest

from beacon_jax.inference.chat import Chat
from beacon_jax.inference.memory import Memory

CONTEXT = "In 1998 the harbour master counted 41 boats; the key is 52817. He wept."
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Leaves out what earlier answers said, as templates of reasoning models do.
FORGETFUL = TEMPLATE.replace(
    "{{ m.content }}",
    "{{ m.content if m.role == 'user' or loop.last else m.content[:2] }}",
)
MESSAGES = ("Who wept?", "And when was that?", "Thanks!")
# One buffer and one number of new tokens: the tests share compiles.
OPTIONS = {"ratio": 4, "max_new_tokens": 9, "capacity": 320}


def assert_same(memory, expected):
    """Equal accounts and equal slots on the device."""
    (ours,), (theirs,) = memory.rows, expected.rows
    for name in ("spans", "ratios", "marks"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.fed == theirs.fed
    for name in ("k", "v"):
        a, b = (np.asarray(getattr(m.state, name)) for m in (memory, expected))
        np.testing.assert_allclose(
            a[:, :, : ours.slots], b[:, :, : ours.slots], atol=1e-5
        )


def at_once(model, chat, memory=None, template=TEMPLATE):
    """The conversation's last prompt as one text, and the answer to it."""
    tokens = Chat(model, memory, chat_template=template).encode(chat.messages[:-1])
    return tokens, model.complete(tokens, memory=memory, **OPTIONS)


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL])
def test_every_turn_answers_as_if_everything_were_fed_at_once(
    model, template, with_context
):
    memory = model.compress(CONTEXT, ratio=4, capacity=320) if with_context else None
    chat = Chat(model, memory, "Be short.", chat_template=template, **OPTIONS)
    for i, text in enumerate(MESSAGES):
        made = chat.say(text)
        tokens, expected = at_once(model, chat, memory, template)
        assert made.tokens.tolist() == expected.tokens.tolist()
        assert_same(chat.memory, expected.memory)
        base = len(CONTEXT) if with_context else 0
        held = chat.memory.rows[0].tokens[base:]
        assert held.tolist() == [*tokens, *made.tokens]
        assert len(chat.messages) == 3 + 2 * i
    if with_context:
        assert memory.lengths.tolist() == [len(CONTEXT)]


def test_a_turn_feeds_only_what_the_memory_does_not_hold(plain_text):
    chat = Chat(plain_text, chat_template=TEMPLATE, **OPTIONS)
    first = chat.say(MESSAGES[0])
    assert first.prompt_tokens == len("<user>") + len(MESSAGES[0]) + 1 + 11
    assert len(first.text) == 9 and first.text.isascii()
    second = chat.say(MESSAGES[1])
    # The first answer is held; its end token was never fed.
    assert second.prompt_tokens == 1 + len("<user>") + len(MESSAGES[1]) + 1 + 11
    assert chat.messages[1] == {"role": "assistant", "content": first.text}
    assert second.tokens.tolist() == at_once(plain_text, chat)[1].tokens.tolist()


def test_undo_leaves_the_conversation_as_before_the_turn(plain_text):
    chat = Chat(plain_text, chat_template=TEMPLATE, **OPTIONS)
    chat.say(MESSAGES[0])
    length = chat.memory.lengths.tolist()
    second = chat.say(MESSAGES[1])
    chat.undo()
    assert len(chat.messages) == 2 and chat.memory.lengths.tolist() == length
    again = chat.say(MESSAGES[1])
    assert again.tokens.tolist() == second.tokens.tolist()
    assert_same(again.memory, second.memory)
    chat.undo()
    other = chat.say(MESSAGES[2])
    assert other.tokens.tolist() == at_once(plain_text, chat)[1].tokens.tolist()
    chat.undo()
    chat.undo()
    assert chat.memory is None and chat.messages == []
    with pytest.raises(ValueError, match="nothing to undo"):
        chat.undo()


@pytest.mark.slow
def test_a_context_without_tokens_can_be_talked_about_and_returned_to(model, tmp_path):
    memory = model.compress(CONTEXT, ratio=4, capacity=320)
    memory.save(tmp_path / "bare.beacon", tokens=False)
    bare = Memory.load(tmp_path / "bare.beacon", model)
    chat = Chat(model, bare, chat_template=FORGETFUL, **OPTIONS)
    for text in MESSAGES:
        made = chat.say(text)
        _, expected = at_once(model, chat, memory, FORGETFUL)
        assert made.tokens.tolist() == expected.tokens.tolist()
        assert_same(chat.memory, expected.memory)
    chat.undo()
    made = chat.say(MESSAGES[2])
    assert made.tokens.tolist() == expected.tokens.tolist()
    for _ in MESSAGES:
        chat.undo()
    assert chat.memory.lengths.tolist() == [len(CONTEXT)]
    first = chat.say(MESSAGES[0])
    _, expected = at_once(model, chat, memory, FORGETFUL)
    assert first.tokens.tolist() == expected.tokens.tolist()


def test_an_error_or_an_interrupt_leaves_the_conversation_as_it_was(plain_text):
    strict = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}"
    chat = Chat(plain_text, chat_template=strict + "{% endif %}" + TEMPLATE, **OPTIONS)
    first = chat.say(MESSAGES[0])
    with pytest.raises(ValueError, match="refuses this: one turn only"):
        chat.say(MESSAGES[1])
    assert chat.memory is first.memory and len(chat.messages) == 2

    def interrupt(_):
        raise KeyboardInterrupt

    chat = Chat(plain_text, chat_template=TEMPLATE, **OPTIONS)
    chat.say(MESSAGES[0])
    with pytest.raises(KeyboardInterrupt):
        chat.say(MESSAGES[1], on_text=interrupt)
    made = chat.say(MESSAGES[1])
    assert made.tokens.tolist() == at_once(plain_text, chat)[1].tokens.tolist()


def test_the_end_token_of_the_tokenizer_ends_an_answer(model):
    kernel = model.variables["params"]["lm_head"]["kernel"]
    config = dataclasses.replace(model.config, eos_ids=())
    free = dataclasses.replace(model, config=config)
    third = int(free.complete("<user>x<end><assistant>", **OPTIONS).tokens[2])
    # Where that token would be the most likely, the end token is: it has 1.01 times its
    # logit, which is positive there.
    ends = kernel.at[:, 256].set(1.01 * kernel[:, third])
    params = model.variables["params"] | {"lm_head": {"kernel": ends}}
    changed = dataclasses.replace(
        model, config=config, variables=model.variables | {"params": params}
    )
    free = changed.complete("<user>x<end><assistant>", **OPTIONS)
    assert 256 in free.tokens
    made = Chat(changed, chat_template=TEMPLATE, **OPTIONS).say("x")
    assert made.finish == "stop" and "<end>" not in made.text
    assert made.tokens.tolist() == free.tokens.tolist()[: len(made.tokens)]
    assert free.tokens[len(made.tokens)] == 256


def test_turns_draw_with_seeds_of_their_own_and_can_be_repeated(plain_text):
    def talk(seed):
        options = {"temperature": 1.5, "seed": seed, **OPTIONS}
        chat = Chat(plain_text, chat_template=TEMPLATE, **options)
        return [chat.say("Again.").text for _ in range(2)]

    assert talk(1) == talk(1) != talk(5)
    second = Chat(
        plain_text, chat_template=TEMPLATE, temperature=1.5, seed=2, **OPTIONS
    )
    chat = Chat(plain_text, chat_template=TEMPLATE, temperature=1.5, seed=1, **OPTIONS)
    chat.say("Again.")
    chat.undo()
    assert chat.say("Again.").text == talk(1)[0] != second.say("Again.").text


def test_a_second_start_token_is_left_out_behind_a_context(model):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = "<end>"
    changed = dataclasses.replace(model, tokenizer=tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    messages = [{"role": "user", "content": "x"}]
    alone = Chat(changed).encode(messages)
    memory = model.compress(CONTEXT, ratio=4, capacity=320)
    behind = Chat(changed, memory).encode(messages)
    assert alone.tolist() == [256, *behind]


def test_what_a_conversation_needs_is_named(model):
    with pytest.raises(ValueError, match="has no chat template.*--chat_template=FILE"):
        Chat(model)
    bare = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ValueError, match="tokenizer=None"):
        Chat(bare, chat_template=TEMPLATE)
    two = model.compress(["a", "b"], ratio=4)
    with pytest.raises(ValueError, match=r"memory has 2 rows.*memory\[i\]"):
        Chat(model, two, chat_template=TEMPLATE)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("chat_template.jinja", "chat_template.jinja"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        (None, ""),
    ],
)
@pytest.mark.parametrize("template", ["{% for", "{{ foo(1) }}", "{{ 1/0 }}"])
def test_the_file_of_a_template_that_is_broken_is_named(
    model, tmp_path, template, file, named
):
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.name_or_path, tokenizer.chat_template = str(tmp_path), template
    if file:
        (tmp_path / file).write_text("{}")
    said = rf"template.*Mend it in {re.escape(str(tmp_path / named))}, or copy that f"
    with pytest.raises(ValueError, match=said):
        Chat(dataclasses.replace(model, tokenizer=tokenizer))


@pytest.fixture
def instruct(model, monkeypatch):
    """The tiny model as if its tokenizer had a template."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    return model


def test_instruct_asks_in_the_template_behind_the_context_as_a_chat_does(instruct):
    memory = instruct.compress(CONTEXT, ratio=4, capacity=320)
    turn = Chat(instruct, memory, **OPTIONS).say(MESSAGES[0])
    asked = {"instruct": True} | OPTIONS
    behind = instruct.complete(MESSAGES[0], memory=memory, **asked)
    whole = instruct.complete([MESSAGES[0]] * 2, context=CONTEXT, **asked)
    for made in (behind, *whole):
        assert made.tokens.tolist() == turn.tokens.tolist()
    assert behind.prompt_tokens == turn.prompt_tokens
    with pytest.raises(ValueError, match="instruct=True with a prompt of type list"):
        instruct.complete([1, 2], **asked)


def test_an_answer_without_a_token_says_why(model, instruct):
    free = model.complete("At dawn", **OPTIONS)
    end = int(free.tokens[0])
    config = dataclasses.replace(instruct.config, eos_ids=(end,))
    ended = dataclasses.replace(instruct, config=config).complete("At dawn", **OPTIONS)
    assert (ended.text, ended.finish) == ("", "stop")
    assert ended.note == (
        "the model ended at once: its first token was an end token. Instruct models "
        "expect --instruct (instruct=True)"
    )
    # A stop string that the user gave explains itself.
    assert model.complete("At dawn", **OPTIONS | {"stop": free.text[0]}).note == ""


def test_time_to_the_first_token_and_the_rate_behind_it_leave_compilation_out(model):
    counts = []
    made = model.complete("At dawn", **OPTIONS, on_tokens=counts.append)
    assert counts == [1, 8]
    timing = made.timing
    assert timing.later_tokens == 8 and timing.tokens_per_second > 0
    total = made.prefill_seconds + made.decode_seconds
    parts = timing.compile + timing.first_token + timing.later
    assert parts == pytest.approx(total, rel=0.05, abs=0.05)
    one = model.complete("At dawn", **OPTIONS | {"max_new_tokens": 1})
    assert one.timing.tokens_per_second is None
