"""What a model is fed of texts, by tokenizers that add a space, bos or eos."""

import copy
import dataclasses

import pytest
from tokenizers import AddedToken

from beacon_jax.inference import model as model_module
from beacon_jax.inference.chat import Chat
from beacon_jax.tokenise import encode, front
from tests.inference.conftest import V
from tests.inference.memories import Fed
from tests.text_tokenizers import ADDED, BOS, SPACED, TEXT, make

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
LEFT, RIGHT = "The argument of the old eng", "ine: a river runs past the stone mill."
kinds = pytest.mark.parametrize(
    "kind", [kind for kind in SPACED if kind not in ("roberta", "stripped", "t5")]
)
added = pytest.mark.parametrize("added", ADDED)


@pytest.fixture
def fed(monkeypatch):
    """Calls a function and returns the ids of each row that would be fed."""
    rows = []

    def record(model, given, *args):
        rows[:] = [row.tolist() for row in given]
        raise Fed

    def call(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(model_module, "feed_rows", record)
            with pytest.raises(Fed):
                function(*args, **options)
        return rows[0] if len(rows) == 1 else [*rows]

    return call


@pytest.fixture
def of(model):
    """The tiny model with another tokenizer."""

    def replaced(kind, added="nothing"):
        tokenizer = make(kind, added)
        assert len(tokenizer) <= V
        return dataclasses.replace(model, tokenizer=tokenizer)

    return replaced


@pytest.fixture(scope="module")
def made(model):
    """A memory of some ids; shared, so that one program serves all."""
    memories = {}

    def remember(ids):
        key = tuple(ids)
        if key not in memories:
            memories[key] = model.compress([*ids], 4, capacity=64)
        return memories[key]

    return remember


@kinds
@added
def test_all_ways_of_feeding_a_text_in_parts_feed_the_whole(of, fed, made, kind, added):
    model = of(kind, added)
    first = front(model.tokenizer).tolist()
    whole = encode(model.tokenizer, LEFT + RIGHT, "start").tolist()
    left = encode(model.tokenizer, LEFT, "start").tolist()
    if whole[: len(left)] != left:  # melted: each side keeps its own tokens
        whole = left + encode(model.tokenizer, RIGHT, "behind").tolist()
    assert whole[: len(first)] == first
    assert model.tokenizer.eos_token_id not in whole
    assert fed(model.compress, LEFT) == fed(model.complete, LEFT) == left
    assert fed(model.complete, RIGHT, context=LEFT) == whole
    memory = made(left)
    for call in (model.complete, model.compress):
        assert left + fed(call, RIGHT, memory=memory) == whole
    rest = fed(model.complete, TEXT[20:], context=RIGHT, memory=memory)
    assert (left + rest)[: len(whole)] == whole


@added
@pytest.mark.parametrize("kind", ["llama-2", "unigram first"])
def test_a_text_has_one_bos_whoever_writes_it(of, fed, made, kind, added):
    model = of(kind, added)
    bos = model.tokenizer.bos_token_id
    assert fed(model.complete, BOS + TEXT).count(bos) == 1
    assert fed(model.complete, TEXT).count(bos) == (added in ("bos", "both"))
    asked = dataclasses.replace(model, tokenizer=copy.deepcopy(model.tokenizer))
    asked.tokenizer.chat_template = TEMPLATE
    alone = fed(asked.complete, "why?", instruct=True)
    assert alone[0] == bos and alone.count(bos) == 1
    ids = encode(model.tokenizer, LEFT, "start").tolist()
    behind = fed(asked.complete, "why?", instruct=True, memory=made(ids))
    assert fed(asked.complete, "why?", instruct=True, context=LEFT) == ids + behind
    assert bos not in behind
    assert asked.tokenizer.decode(behind) == "(user) why?\n(assistant)"
    chat = Chat(asked, made(ids))
    assert bos not in chat.encode([{"role": "user", "content": "why?"}])
    turns = fed(Chat(asked).say, "why?")
    assert turns == alone


@pytest.mark.parametrize("kind", ["llama-2", "unigram always"])
def test_spans_of_a_part_mark_its_tokens(of, made, kind):
    model = of(kind, "both")
    marked = {}

    def keep(self, rows, spans, *args):
        marked.update(row=rows[0], spans=spans[0])
        raise Fed

    ids = encode(model.tokenizer, LEFT, "start").tolist()
    for memory in (None, made(ids)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Fed):
            patch.setattr(type(model), "_plans", keep)
            model.compress("ine: a river", memory=memory, spans="river")
        ((start, stop),) = marked["spans"].tolist()
        text = model.tokenizer.decode(marked["row"][start:stop])
        assert text.strip() == "river" and stop == len(marked["row"])


def test_a_memory_that_holds_nothing_is_the_start_of_a_text(of, fed, made):
    model = of("llama-2", "bos")
    empty = made(range(20)).truncate(0)
    assert fed(model.complete, TEXT, memory=empty) == fed(model.complete, TEXT)


@pytest.mark.usefixtures("nothing_is_fed")
@pytest.mark.parametrize("token", ["<tool>", "<call>"])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, text: m.complete(text),
        lambda m, text: m.complete([text, "good"]),
        lambda m, text: m.complete("good", context=text),
        lambda m, text: m.complete(text, context="good"),
        lambda m, text: m.generate(text, instruct=True),
        lambda m, text: m.generate("good", context=text, instruct=True),
        lambda m, text: m.compress(text),
        lambda m, text: m.compress(["good", text]),
        lambda m, text: m.compress(text, spans="good"),
        lambda m, text: Chat(m).say(text),
        lambda m, text: Chat(m, system=text).say("good"),
    ],
)
def test_a_token_beyond_the_embedding_is_named_before_anything_is_fed(
    model, call, token
):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("<call>")])
    tokenizer.chat_template = TEMPLATE
    model = dataclasses.replace(model, tokenizer=tokenizer)
    beyond = tokenizer.convert_tokens_to_ids(token)
    assert beyond >= V
    said = rf"to {beyond}, the model has 0 to {V - 1}: {beyond} \('{token}'\)"
    with pytest.raises(ValueError, match=said):
        call(model, f"good {token} text")
