"""Streams: cut anywhere, they give the same lines and elements, in bounded memory."""

import json
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.data.streams import Bad, elements, first_after, lines

LEAF = st.one_of(
    st.text(alphabet='a"\\{}[],é\n', max_size=8),
    st.integers(-9, 9),
    st.none(),
)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(alphabet='b"\\]', max_size=3), inner, max_size=3),
    ),
    max_leaves=8,
)


def pieces(data, size):
    return (data[i : i + size] for i in range(0, len(data), size))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(VALUE, max_size=6),
    st.integers(1, 9),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_elements_are_those_of_a_parser_however_the_bytes_arrive(
    values, size, indent, ascii
):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii).encode()
    found = list(elements(pieces(b" \n" + data + b"\n ", size), 10_000))
    assert [json.loads(element) for element in found] == values


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=9), st.integers(1, 9), st.booleans())
def test_lines_are_those_of_split_and_longer_ones_are_named(lengths, size, ended):
    data = b"\n".join(b"x" * n for n in lengths) + b"\n" * ended
    wanted = data.split(b"\n")
    wanted = wanted if wanted[-1] else wanted[:-1]
    found = list(lines(pieces(data, size), 8))
    assert found == [
        line if len(line) <= 8 else Bad("line longer than 8 bytes") for line in wanted
    ]


def test_a_row_beyond_the_limit_is_skipped_in_bounded_memory():
    def line(before, after):
        yield before
        for _ in range(200):
            yield b"x" * 2**17
        yield after

    for split, before, after in (
        (lines, b'{"a": 1}\n{"b": "', b'"}\n{"c": 1}\n'),
        (elements, b'[{"a": 1},{"b": "', b'"},{"c": 1}]'),
    ):
        tracemalloc.start()
        first, bad, last = split(line(before, after), 2**20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (first, last) == (b'{"a": 1}', b'{"c": 1}')
        assert isinstance(bad, Bad) and bad.reason.endswith("longer than 1 MiB")
        assert peak < 4 * 2**20, f"{peak} bytes for a row of 25 MiB"


@given(st.text(alphabet="aé\n😀", max_size=40), st.integers(0, 60))
def test_a_text_is_cut_after_a_line_or_before_a_character(tmp_path_factory, text, at):
    data = text.encode()
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(data)
    with open(path, "rb") as file:
        if at >= len(data):
            return
        cut = first_after(file, at, 6)
    data[:cut].decode()
    assert at <= cut <= at + 6
    ends = [
        i + 1 for i, byte in enumerate(data) if byte == 10 and at <= i + 1 <= at + 6
    ]
    assert cut == ends[0] if ends and at else cut - at < 4
