"""JSON arrays and objects one after another: elements at their places, bad ones alone, broken syntax at its byte."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_help import BOM, input_of, rows_of

from retrotool.sources import Document, Fields, SetAside, read, streams
from retrotool.sources.json_array import elements

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
def test_elements_of_an_array_are_found_at_their_places(items, layout, space, bom, block):
    parts = [json.dumps(item, **layout).encode() for item in items]
    gap = space.encode()
    data = BOM * bom + gap + b"[" + b",".join(gap + part + gap for part in parts) + b"]" + gap
    found = list(elements(in_blocks(data, block), 1 << 20))
    assert [element.data for element in found] == parts
    assert [element.number for element in found] == list(range(1, len(parts) + 1))
    assert all(data[element.offset :].startswith(element.data) for element in found)


@given(st.lists(objects, min_size=1, max_size=6), layouts, spaces, st.integers(1, 40))
def test_objects_one_after_another_are_found_at_their_places(items, layout, space, block):
    parts = [json.dumps(item, **layout).encode() for item in items]
    data = space.encode() + space.encode().join(parts) + space.encode()
    found = list(elements(in_blocks(data, block), 1 << 20))
    assert [element.data for element in found] == parts
    assert all(data[element.offset :].startswith(element.data) for element in found)


@given(st.lists(objects, min_size=1, max_size=5), st.data())
def test_an_array_cut_off_anywhere_gives_what_came_before_and_says_where(folder, items, data):
    whole = json.dumps(items).encode()
    size = data.draw(st.integers(1, len(whole) - 1))
    *rows, last = rows_of(folder / "cut.json", whole[:size])
    assert (type(last), last.damage) == (SetAside, True)
    assert 0 <= last.offset <= size
    assert [row.text for row in rows] == [item["text"] for item in items[: len(rows)]]
    complete = sum(len(json.dumps(items[:n])) - 1 <= size for n in range(1, len(items) + 1))
    assert len(rows) == complete


@given(st.lists(objects, min_size=1, max_size=4), layouts, st.data())
def test_no_change_of_a_byte_is_silent_or_a_crash(folder, items, layout, data):
    whole = bytearray(json.dumps(items, **layout).encode())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    rows = rows_of(folder / "changed.json", bytes(whole))
    try:
        now = json.loads(bytes(whole))
    except (ValueError, UnicodeDecodeError):
        assert any(isinstance(row, SetAside) for row in rows)
        return
    if isinstance(now, list):
        assert len(rows) == len(now)


BAD_ELEMENTS = {
    "1": "not a JSON object but a number",
    "null": "not a JSON object but null",
    '["text"]': "not a JSON object but an array",
    '"}],["': "not a JSON object but a string",
    "": "not JSON",
    "nonsense": "not JSON",
    '{"text": NaN}': "not JSON",
    '{"text": -Infinity}': "not JSON",
    '{"text": "\\ud800"}': "not JSON",
    '{"text": "x"} {"text": "y"}': "not JSON",
    '{"text": "he said "hi" there"}': "not JSON",
    "{'text': 'x'}": "not JSON",
    '{"text": "a\nb"}': "not JSON",
    '{"body": "x"}': "no field 'text'",
    '{"text": "\xff"}': "invalid UTF-8 at byte 10 of the element",
}


@pytest.mark.parametrize("bad", BAD_ELEMENTS)
def test_a_bad_element_is_set_aside_alone(tmp_path, bad):
    data = b'[{"text": "one"},\n ' + bad.encode("latin-1") + b'\n, {"text": "three"}]'
    first, second, third = rows_of(tmp_path / "a.json", data)
    assert [first.text, third.text] == ["one", "three"]
    assert second.reason.startswith(BAD_ELEMENTS[bad])
    assert (second.line, second.damage) == (2, False)
    assert data[second.offset :].startswith(bad.encode("latin-1"))


BROKEN = {
    '[{"text": "one"}, {"text': (1, 18, "the array is never closed"),
    '[{"text": "one"}, {"text": "two}, {"text": "three"}]': (1, 18, "the array is never closed"),
    '[{"text": "one"}, {"text": ["two"}, {"text": "three"}]': (1, 18, "the array is never closed"),
    '[{"text": "one"}': (1, 1, "the array is never closed"),
    '[{"text": "one"},': (1, 17, "the array is never closed"),
    '[{"text": "one"}]]': (1, 17, "more follows the array's end"),
    '[{"text": "one"}]\n[{"text": "two"}]': (1, 18, "more follows the array's end"),
    '\n{"text":\n"one"} }{"text": "x"}': (1, 17, "a bracket is closed that was not opened"),
    '{"text":\n"one"} {"text": "': (1, 16, "an object is never closed"),
    '"text"': (0, 0, "neither an array of objects nor objects"),
    " \n ": (0, 3, "nothing but white space"),
    "\0\0": (0, 0, "neither an array of objects nor objects"),
}


@pytest.mark.parametrize("data", BROKEN)
@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_broken_syntax_breaks_off_the_rest_at_its_byte(tmp_path, data, block):
    with patch.object(streams, "BLOCK_BYTES", block):
        *rows, last = rows_of(tmp_path / "a.json", data.encode())
    count, offset, reason = BROKEN[data]
    assert [row.text for row in rows] == ["one"] * count
    assert (last.line, last.offset, last.damage) == (count + 1, offset, True)
    assert last.reason == f"broken off after element {count}, at byte {offset}: {reason}"


def test_trailing_commas_and_space_are_no_elements(tmp_path):
    assert [row.text for row in rows_of(tmp_path / "a.json", b'[ {"text": "x"} , ] \n')] == ["x"]
    assert rows_of(tmp_path / "b.json", b" [ ] ") == []


def test_long_elements_are_not_held_and_what_follows_is_read(tmp_path):
    with patch("retrotool.sources.json_array.line_limit", lambda fields: 100):
        data = json.dumps([{"text": "x" * 200}, {"text": "y"}, {"text": "}" * 200}]).encode()
        for block in (1, 64, 1 << 18):
            with patch.object(streams, "BLOCK_BYTES", block):
                one, two, three = rows_of(tmp_path / "a.json", data)
            assert one.reason == "element of 212 bytes, longer than 100"
            assert three.reason == "element of 213 bytes, longer than 100"
            assert (two.text, two.line, two.position) == ("y", 2, 215)


def test_json_lines_in_a_json_file_are_read_line_by_line(tmp_path):
    data = b'\n{"text": "one"}\n{"text": broken\n{"text": "three"}\n'
    one, two, three = rows_of(tmp_path / "a.json", data)
    assert (one.text, one.line, three.text, three.line) == ("one", 2, "three", 4)
    assert two.reason.startswith("not JSON")


def test_an_object_at_the_top_is_one_document(tmp_path):
    (row,) = rows_of(tmp_path / "a.json", json.dumps({"text": "x", "pages": [1, 2]}, indent=1).encode())
    assert isinstance(row, Document)
    (row,) = rows_of(tmp_path / "b.json", json.dumps({"data": [{"text": "x"}]}, indent=1).encode())
    assert row.reason == "no field 'text'"


@pytest.mark.parametrize("count", [2, 3, 1000, 70_001])
def test_runs_of_backslashes_across_blocks_are_counted(tmp_path, count):
    data = b'[{"text": "' + b"\\" * count + b'"}, {"text": "b"}]'
    if count % 2:
        data = data.replace(b'"}, {', b'""}, {')
    file = input_of(tmp_path / "a.json", data)
    for block in (7, 1000):
        with patch.object(streams, "BLOCK_BYTES", block):
            one, two = read(file, Fields())
        assert one.text == "\\" * (count // 2) + '"' * (count % 2)
        assert two.text == "b"
