"""JSON arrays and objects one after another: what json.loads reads; broken syntax rejects the rest at its element."""

from __future__ import annotations

import json
import tracemalloc
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_help import BOM, input_of, rows_of

from retrotool.sources import Document, Fields, Rejected, read_input, streams
from retrotool.sources.json_array import elements
from retrotool.sources.streams import BrokenStream

texts = st.text(st.sampled_from('ab"\\{}[],:\n é🎈/'), min_size=1, max_size=15)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.builds(lambda text, more: {"text": text, **more}, texts, st.dictionaries(texts, values, max_size=3))
layouts = st.sampled_from([{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
spaces = st.sampled_from(["", " ", "\n", "\r\n\t "])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


def in_blocks(data: bytes, size: int):
    return (data[i : i + size] for i in range(0, len(data), size))


@given(st.lists(values | objects, max_size=6), layouts, spaces, st.booleans(), st.integers(1, 40))
def test_elements_of_an_array_are_those_of_json_loads(items, layout, space, bom, block):
    parts = [json.dumps(item, **layout).encode() for item in items]
    gap = space.encode()
    data = BOM * bom + gap + b"[" + b",".join(gap + part + gap for part in parts) + b"]" + gap
    assert list(elements(in_blocks(data, block), 1 << 20)) == json.loads(data)


@given(st.lists(objects, min_size=1, max_size=6), layouts, spaces, st.integers(1, 40))
def test_objects_one_after_another_are_read(items, layout, space, block):
    parts = [json.dumps(item, **layout).encode() for item in items]
    data = space.encode() + space.encode().join(parts) + space.encode()
    assert list(elements(in_blocks(data, block), 1 << 20)) == items


@given(st.lists(objects, min_size=1, max_size=5), st.data())
def test_an_array_cut_off_anywhere_gives_what_came_before_and_says_where(folder, items, data):
    whole = json.dumps(items).encode()
    size = data.draw(st.integers(1, len(whole) - 1))
    *rows, last = rows_of(folder / "cut.json", whole[:size])
    assert (type(last), last.damage, last.line) == (Rejected, True, len(rows) + 1)
    assert last.reason.startswith(f"broken off after element {len(rows)}: ")
    complete = sum(len(json.dumps(items[:n])) - 1 <= size for n in range(1, len(items) + 1))
    assert [row.text for row in rows] == [item["text"] for item in items[:complete]]


@given(st.lists(objects, min_size=1, max_size=4), layouts, st.data())
def test_no_change_of_a_byte_is_silent_or_a_crash(folder, items, layout, data):
    whole = bytearray(json.dumps(items, **layout).encode())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    rows = rows_of(folder / "changed.json", bytes(whole))
    try:
        now = json.loads(bytes(whole))
    except (ValueError, UnicodeDecodeError):
        # yajl takes vertical tabs and form feeds for white space.
        assert any(isinstance(row, Rejected) for row in rows) or {0x0B, 0x0C} & set(whole)
        return
    if isinstance(now, list):
        assert len(rows) == len(now) or (isinstance(rows[-1], Rejected) and "lone surrogate" in rows[-1].reason)


BAD_ELEMENTS = {
    "1": "not a JSON object but a number",
    "-1.5e3": "not a JSON object but a number",
    "null": "not a JSON object but null",
    "false": "not a JSON object but a truth value",
    '["text", {"text": []}]': "not a JSON object but an array",
    '"}],["': "not a JSON object but a string",
    '{"body": "x"}': "no field 'text'",
    '{"text": ["x"]}': "'text' is not a string",
}


@pytest.mark.parametrize("bad", BAD_ELEMENTS)
def test_an_element_without_text_is_rejected_alone(tmp_path, bad):
    data = b'[{"text": "one"},\n ' + bad.encode() + b'\n, {"text": "three"}]'
    first, second, third = rows_of(tmp_path / "a.json", data)
    assert [first.text, third.text] == ["one", "three"]
    assert second.reason == BAD_ELEMENTS[bad]
    assert (second.line, second.damage) == (2, False)
    assert second.excerpt == "body" or json.loads(second.excerpt) == json.loads(bad)


def test_an_element_that_is_nested_too_deep_to_be_quoted_is_rejected_alone(tmp_path):
    deep = '{"body": ' + "[" * 400 + "]" * 400 + "}"
    first, second, third = rows_of(tmp_path / "a.json", f'[{{"text": "one"}}, {deep}, {{"text": "three"}}]'.encode())
    assert (first.text, second.reason, second.damage, third.text) == ("one", "no field 'text'", False, "three")


BROKEN = {
    '[{"text": "one"}, {"text': (1, "parse error: premature EOF"),
    '[{"text": "one"}, {"text": "two}, {"text": "three"}]': (1, "lexical error: invalid "),
    '[{"text": "one"}, {"text": ["two"}, {"text": "three"}]': (1, "parse error: "),
    '[{"text": "one"}': (1, "parse error: premature EOF"),
    '[{"text": "one"},': (1, "parse error: premature EOF"),
    '[{"text": "one"},]': (1, "parse error: unallowed token"),
    '[{"text": "one"}]]': (1, "parse error: trailing garbage"),
    '[{"text": "one"}]\n[{"text": "two"}]': (1, "parse error: trailing garbage"),
    '\n{"text":\n"one"} }{"text": "x"}': (1, "parse error: unallowed token"),
    '{"text":\n"one"} {"text": "': (1, "parse error: premature EOF"),
    '[{"text": "one"}, {"text": NaN}]': (1, "lexical error: invalid char in json text."),
    '[{"text": "one"}, {"text": "a\nb"}]': (1, "lexical error: invalid character inside string."),
    '[{"text": "one"}, {"text": "\xff"}]': (1, "lexical error: invalid bytes in UTF8 string."),
    '[{"text": "one"}, {"n": 9223372036854775808}]': (1, "parse error: integer overflow"),
    '[{"text": "one"}, {"text": "\\ud83d\\u0041"}]': (1, "a lone surrogate"),
    '[{"text": "one"}, {"text": "\\ud83d"}]': (1, "a lone surrogate"),
    '[{"text": "one"}, {"text": "\\uDE00"}]': (1, "a lone surrogate"),
    '[{"text": "one"}, ' + "[" * 2000: (1, "nested more than 1,000 deep"),
    '"text"': (0, "neither an array of objects nor objects"),
    " \n ": (0, "nothing but white space"),
    "\0\0": (0, "neither an array of objects nor objects"),
}


@pytest.mark.parametrize("data", BROKEN)
@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_broken_syntax_rejects_the_rest_at_its_element(tmp_path, data, block):
    with patch.object(streams, "BLOCK_BYTES", block):
        *rows, last = rows_of(tmp_path / "a.json", data.encode("latin-1"))
    count, reason = BROKEN[data]
    assert [row.text for row in rows] == ["one"] * count
    assert (last.line, last.damage) == (count + 1, True)
    assert last.reason.startswith(f"broken off after element {count}: {reason}")


@pytest.mark.parametrize("block", [1, 2, 5, 11, 12, 13, 1 << 18])
def test_surrogates_in_pairs_are_read_wherever_a_block_ends(tmp_path, block):
    items = [{"text": "🎈" * 3}, {"text": "\\ud83d"}, {"text": '"🎈"\\🎈'}]
    with patch.object(streams, "BLOCK_BYTES", block):
        rows = rows_of(tmp_path / "a.json", json.dumps(items).encode())
    assert [row.text for row in rows] == [item["text"] for item in items]


def test_an_empty_array_has_no_rows(tmp_path):
    assert rows_of(tmp_path / "b.json", b" [ ] ") == []


@pytest.mark.parametrize("block", [1, 64, 1 << 18])
def test_an_element_over_the_limit_rejects_the_rest(block):
    data = json.dumps([{"text": "x" * 20}, {"text": "}" * 300_000}, {"text": "y"}]).encode()
    found = elements(in_blocks(data, block), 100_000)
    assert next(found) == {"text": "x" * 20}
    with pytest.raises(BrokenStream, match="element of more than 100,000 bytes"):
        list(found)


@pytest.mark.parametrize(
    "rest", [b"[" * 9_000_000, b'{"a":' * 2_000_000, b'"' + b"x" * 9_000_000, b"1" * 9_000_000],
    ids=["brackets", "objects", "string", "number"],
)  # fmt: skip
def test_what_has_no_end_is_not_held(tmp_path, rest):
    file = input_of(tmp_path / "a.json", b'[{"text": "one"}, ' + rest)
    tracemalloc.start()
    one, last = read_input(file, Fields(max_document=1 << 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (one.text, last.damage) == ("one", True)
    assert peak < 64 << 20


def test_json_lines_in_a_json_file_are_read_line_by_line(tmp_path):
    data = b'\n{"text": "one"}\n{"text": broken\n{"text": "three"}\n'
    one, two, three = rows_of(tmp_path / "a.json", data)
    assert (one.text, one.line, one.position, three.text, three.line) == ("one", 2, 2, "three", 4)
    assert two.reason.startswith("not JSON")


def test_an_object_at_the_top_is_one_document(tmp_path):
    (row,) = rows_of(tmp_path / "a.json", json.dumps({"text": "x", "pages": [1, 2]}, indent=1).encode())
    assert isinstance(row, Document)
    (row,) = rows_of(tmp_path / "b.json", json.dumps({"data": [{"text": "x"}]}, indent=1).encode())
    assert row.reason == "no field 'text'"


@pytest.mark.parametrize("count", [2, 3, 1000, 70_001])
def test_runs_of_backslashes_across_blocks_are_read(tmp_path, count):
    items = [{"text": "\\" * count + '"'}, {"text": "b"}]
    file = input_of(tmp_path / "a.json", json.dumps(items).encode())
    for block in (7, 1000):
        with patch.object(streams, "BLOCK_BYTES", block):
            assert [row.text for row in read_input(file, Fields())] == [item["text"] for item in items]
