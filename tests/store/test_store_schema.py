"""What is read of a store is as its schema says, or an error names the file and the field: right sums prove nothing.

Here an attacker can write JSON, with the right sums, and chain the log again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from conftest import times
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from staging_help import planned_store, unit
from store_help import commit, contents, make_store, write
from stored import copy_store, remove_store, stored_file, stored_files, write_stored

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.errors import CorruptError, RetrotoolError
from retrotool.inspect.run import Choice
from retrotool.store import folding, identity, leases, log, paths, schema, specs, staging
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.schema import DEEPEST, Keyed, Maybe
from retrotool.store.state import decode_checkpoint, encode_checkpoint
from retrotool.store.storage import storage_at
from retrotool.store.store import Store, newest_checkpoint

NAME = re.compile("[a-z]+")
KEYED = Keyed({"a": range(5), "b:": {"c": str}}, re.compile("[a-z:]+"))
CHOOSES = lambda value: str if isinstance(value, str) else [range(2)]  # noqa: E731

FITS: list[tuple[Any, Any]] = [
    (str, ""), (bool, False), (float, 1), (float, -0.5), (range(3), 0), (range(3), 2), (NAME, "abc"),
    (frozenset((2, 4)), 4), ([str], []), ([str], ["a", "b"]), ((str, bool), ["a", True]), ({}, {"any": [1]}),
    ({"a": str, "b?": bool}, {"a": "", "newer": 1}), ({"a": str, "b?": bool}, {"a": "", "b": True}),
    ({NAME: range(3)}, {"x": 1, "y": 2}), (Maybe(str), None), (Maybe(str), ""), ([Maybe(str)], [None, "a"]),
    (KEYED, {"a": 4, "b:x": {"c": ""}, "newer": None, "newer:x": 1}), ([CHOOSES], ["a", [1], "b"]),
]  # fmt: skip
UNFIT: list[tuple[Any, Any, str]] = [
    (str, 1, "it is 1, not text"),
    (str, None, "it is null, not text"),
    (bool, 1, "it is 1, not true or false"),
    (float, True, "it is true, not a number"),
    (float, float("inf"), "it is null, not a number"),
    (range(3), 3, "it is 3, not an integer from 0 to 2"),
    (range(3), -1, "it is -1, not an integer from 0 to 2"),
    (range(3), True, "it is true, not an integer"),
    (range(3), 1.0, "it is 1.0, not an integer"),
    (NAME, "a1", 'it is "a1", not text of the form [a-z]+'),
    (NAME, "x" * 99 + "1", 'it is "' + "x" * 79 + "…, not text"),
    (frozenset((2, 4)), 2.0, "it is 2.0, not one of 2, 4"),
    (frozenset((2, 4)), 3, "it is 3, not one of 2, 4"),
    ([str], {}, "it is an object, not a list"),
    ([str], ["a", "b", 3, 4], "[2] is 3, not text"),
    ((str, bool), ["a"], "it is a list, not a list of 2"),
    ((str, bool), ["a", 1], "[1] is 1, not true or false"),
    ({}, [], "it is a list, not an object"),
    ({"a": str}, {}, "a is missing"),
    ({"a": {"b": [{"c": str}]}}, {"a": {"b": [{"c": ""}, {"c": 5}]}}, "a.b[1].c is 5, not text"),
    ({"a?": str}, {"a": None}, "a is null, not text"),
    ({"a": {NAME: range(3)}}, {"a": {"x": 1, "y": 3}}, "a[y] is 3, not an integer"),
    ({"a": {NAME: range(3)}}, {"a": {"x1": 1}}, 'a (a name) is "x1", not text of the form'),
    (Maybe(str), 1, "it is 1, not text"),
    ({"r": KEYED}, {"r": {"b:x": {"c": ""}, "b:y": {"c": 1}}}, "r[b:y].c is 1, not text"),
    ({"r": KEYED}, {"r": {"b:../x": {"c": ""}}}, 'r (a name) is "b:../x", not text'),
    ({"r": KEYED}, {"r": {"a": None}}, "r[a] is null, not an integer"),
    ([CHOOSES], ["a", [1], [2], 3], "[2][0] is 2, not an integer from 0 to 1"),
    ([CHOOSES], ["a", 3], "[1] is 3, not a list"),
    ([[[range(2)]]], [[[0], [1, 1]], [[1], [0, 7]]], "[1][1][1] is 7, not"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "value"), FITS)
def test_what_fits(spec: Any, value: Any) -> None:
    assert schema.load(orjson.dumps(value), spec, "file") == value


@pytest.mark.parametrize(("spec", "value", "said"), UNFIT)
def test_what_does_not_fit_is_named(spec: Any, value: Any, said: str) -> None:
    with pytest.raises(CorruptError) as caught:
        schema.check_value(value, spec, "some/file.json")
    assert str(caught.value).startswith(f"some/file.json: {said}")
    assert caught.value.exit_code == 12


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_is_nested_so_deep_and_no_deeper(opening: str, closing: str) -> None:
    def nested(depth: int) -> bytes:
        inner = opening * (depth - 1) + "0" + closing * (depth - 1)
        return f'{{"{"{" * DEEPEST}": {inner}}}'.encode()

    schema.load(nested(DEEPEST), {}, "file")
    for depth in (DEEPEST + 1, 250, 1_000, 100_000):
        with pytest.raises(CorruptError, match=r"file is (nested more than 32 levels deep|not JSON)"):
            schema.load(nested(depth), {}, "file")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'"\\ud800"', b"NaN", b"{} {}"])
def test_what_is_no_json_is_an_error(data: bytes) -> None:
    with pytest.raises(CorruptError, match="file is not JSON"):
        schema.load(data, str, "file")


@pytest.mark.parametrize("number", [b"9" * 5000, b"1e999", b"-1e999", b"18446744073709551616"])
def test_numbers_that_are_too_large_are_refused(number: bytes) -> None:
    for spec in (specs.COUNT, specs.PART, specs.INT64):
        with pytest.raises(CorruptError):
            schema.load(number, spec, "file")


# JSON of real stores, of which anything may be anything.

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.sampled_from(["", "x", "../x", "/etc/passwd", "a\0b", "000000", "9" * 5000, "main", "0" * 64, 1 << 31, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
Place = tuple[str | int, ...]


def places(value: Any, before: Place = ()) -> list[Place]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(place for key, one in inner for place in places(one, (*before, key)))]


def at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def altered(data: st.DataObject, value: Any, where: Callable[[Place], bool] = bool) -> tuple[Any, Place]:
    """JSON with something else, or nothing, in some place; and the place."""
    value = orjson.loads(orjson.dumps(value))
    place = data.draw(st.sampled_from([one for one in places(value) if where(one)]))
    outer, key = at(value, place[:-1]), place[-1]
    if isinstance(key, str) and data.draw(st.integers(0, 4)) == 0:
        del outer[key]
    else:
        outer[key] = data.draw(JUNK | st.sampled_from([at(value, one) for one in places(value)]).map(_copy))
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:  # a string that is no UTF-8
        assume(False)
    return value, place


def _copy(value: Any) -> Any:
    return orjson.loads(orjson.dumps(value))


def fields_of(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = orjson.loads(path.read_bytes())
    fields.pop("sha256")
    return fields


class Forger:
    """Changes a store, and puts it back as it was."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits = stored_files(root, "log/*")
        self.files = {path: path.read_bytes() for path in (stored_file(root, "store.json"), *self.commits)}

    def restore(self) -> None:
        for path, data in self.files.items():
            if path.read_bytes() != data:
                path.write_bytes(data)

    def put(self, first: int, fields: Any, parent: str | None = None) -> Path:
        """Put something in the place of a commit, and chain all after it again.

        Tables of neighbours name the commits that they are of, so these names are changed, too.
        """
        heads: dict[bytes, bytes] = {}
        for number, path in enumerate(self.commits[first:], first):
            before = self.files[path]
            if number > first:
                for old, new in heads.items():
                    before = before.replace(old[:16], new[:16])
                fields = orjson.loads(before)
                del fields["sha256"]
            if parent is not None:
                fields["parent"] = parent
            after = log.with_checksum(orjson.dumps(fields))
            path.write_bytes(after)
            parent = hashlib.sha256(after).hexdigest()
            heads[hashlib.sha256(self.files[path]).hexdigest().encode()] = parent.encode()
        return self.commits[first]


@pytest.fixture(scope="module")
def rich(built_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``built_store`` after purges, of which one was undone and one erased; and a ``chunk`` that waits."""
    folder = tmp_path_factory.mktemp("rich")
    store = copy_store(built_store, folder / "store")
    purged = [api.purge(store, api.Selectors(where=f"id = 'doc-{n}'"), reason="test").purge for n in (3, 4, 5)]
    api.undo(store, purged[0], reason="test")
    api.erase(store, [purged[1]])
    again = folder / "again.jsonl"
    again.write_text('{"id": "doc-7", "text": "again"}\n')
    with pytest.raises(RetrotoolError, match="another text"):
        api.chunk(store, [str(again)], existing="fail")
    assert api.verify(store).ok
    return store


@pytest.fixture(scope="module")
def forger(rich: Path) -> Forger:
    return Forger(rich)


@pytest.fixture(autouse=True)
def _as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "forger" in request.fixturenames:
        request.getfixturevalue("forger").restore()


def names_it(error: CorruptError, path: Path, place: Place) -> bool:
    """Whether an error names the file, and the field; or the commit that can't be where it is."""
    said = str(error)
    if re.search(r"commit \d+ is invalid: |the log has no record|contains commit|is not the child", said):
        return True
    return path.name in said and any(str(key) in said for key in place)


READ: dict[str, Callable[[Path], object]] = {
    "info": api.info,
    "files": api.list_files,
    "log": lambda root: list(api.log_entries(root)),
}


def read(root: Path, more: dict[str, Callable[[Path], object]] | None = None) -> None:
    """Read a store that could be opened: what does not work is a ``RetrotoolError``."""
    for command in {**READ, **(more or {})}.values():
        try:
            command(root)
        except RetrotoolError as error:
            assert str(error)


@given(st.data())
def test_a_commit_can_be_read_or_is_refused(forger: Forger, data: st.DataObject) -> None:
    forger.restore()
    number = data.draw(st.integers(0, len(forger.commits) - 1))
    fields, place = altered(data, fields_of(forger.commits[number]))
    path = forger.put(number, fields)
    try:
        Store.open(forger.root)
    except CorruptError as error:
        assert names_it(error, path, place), error
        assert api.verify_log(forger.root).problems
    else:
        api.verify_log(forger.root)
        read(forger.root)


def is_accepted(fields: Any) -> bool:
    try:
        schema.check_value(fields, specs.COMMIT, "")
    except CorruptError:
        return False
    return True


def is_read(place: Place) -> bool:
    """Whether a place in a commit is one that commands read."""
    return len(place) > 1 and place[0] in ("add", "records") and place[-1] not in ("path", "sha256")


def alike(value: Any) -> st.SearchStrategy[Any]:
    """Something else of the same type."""
    if isinstance(value, list):
        return st.sampled_from([[], value[:-1], value + value, value[::-1]])
    of: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 9) | st.sampled_from([1000, (1 << 31) - 1, (1 << 53) - 1]),
        float: st.floats(-10, 10) | st.sampled_from([0, 1e300, 5e-324]),
        str: st.sampled_from(["", "x", "main", "tiny", "000001", "/nowhere", "0123456789abcdef"]),
    }
    return of.get(type(value), st.none())


@settings(max_examples=times(6, 200), suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(st.data())
def test_whatever_fits_can_be_used(forger: Forger, loaded: Any, data: st.DataObject) -> None:
    forger.restore()
    commits = [fields_of(path) for path in forger.commits]
    number, place = data.draw(
        st.sampled_from([(n, one) for n, fields in enumerate(commits) for one in places(fields) if is_read(one)])
    )
    fields = commits[number]
    at(fields, place[:-1])[place[-1]] = data.draw(alike(at(fields, place)))
    assume(is_accepted(fields))
    forger.put(number, fields)
    api.verify(forger.root)
    read(forger.root, {"search": partial(search, encoder=loaded), "inspect": inspect})


@pytest.fixture(scope="module")
def loaded(built_store: Path) -> Any:
    return api.open_store(built_store).load_encoder()


def search(root: Path, encoder: Any) -> None:
    reader = api.open_store(root)
    for found in reader.search("store chunk token", 3, encoder=encoder):
        reader.neighbours(found.id)


def inspect(root: Path) -> None:
    api.inspect(root, Choice(random=3))


@given(st.data())
def test_an_identity_can_be_read_or_is_refused(forger: Forger, data: st.DataObject) -> None:
    forger.restore()
    path = stored_file(forger.root, "store.json")
    fields, place = altered(data, fields_of(path))
    path.write_bytes(identity._encode(fields))
    forger.put(0, fields_of(forger.commits[0]), hashlib.sha256(path.read_bytes()).hexdigest())
    try:
        Store.open(forger.root)
    except CorruptError as error:
        assert names_it(error, path, place), error
    except RetrotoolError as error:
        assert place == ("format",) and "format" in str(error)
    else:
        read(forger.root)


@given(st.data())
def test_a_checkpoint_is_the_fold_or_is_named(forger: Forger, data: st.DataObject) -> None:
    """What makes no sense is passed over; what does, and is not the fold, is for ``verify``."""
    forger.restore()
    true = Store.open(forger.root).state
    header, _, body = encode_checkpoint(true).partition(b"\n")
    fields, _ = altered(data, orjson.loads(body))
    body = orjson.dumps(fields)
    sums = {**orjson.loads(header), "sha256": hashlib.sha256(body).hexdigest()}
    name = f"checkpoints/{true.number:08d}-0123abcd01234567.json"
    path = write_stored(forger.root, name, orjson.dumps(sums) + b"\n" + body)
    try:
        taken = newest_checkpoint(storage_at(forger.root))
        problems = api.verify_log(forger.root).problems
        same = taken is not None and contents(taken) == contents(true)
        assert same or any(path.name in problem for problem in problems)
        read(forger.root)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda columns: columns["rows"].pop(), "columns of chunks"),
        (lambda columns: columns["slot"].__setitem__(0, columns["slot"][1]), "columns of chunks"),
        (lambda columns: columns["slot"].__setitem__(0, "0000001"), "groups[0][2].slot[0]"),
        (lambda columns: columns["bytes"].__setitem__(1, -1), "groups[0][2].bytes[1] is -1"),
        (lambda columns: columns["about"].__setitem__(2, {"keys": True}), "groups[0][2].about[2].keys is true"),
        (lambda columns: columns.pop("file"), "groups[0][2].file is missing"),
    ],
    ids=["short", "twice", "slot", "bytes", "about", "file"],
)
def test_what_is_wrong_with_a_checkpoint_is_said(rich: Path, change: Callable[[Any], object], said: str) -> None:
    state = Store.open(rich).state
    header, _, body = encode_checkpoint(state).partition(b"\n")
    fields = orjson.loads(body)
    assert fields["groups"][1][0] == "chunks"
    fields["groups"] = fields["groups"][1:2]
    change(fields["groups"][0][2])
    body = orjson.dumps(fields)
    sums = {**orjson.loads(header), "sha256": hashlib.sha256(body).hexdigest()}
    with pytest.raises(CorruptError, match=re.escape(said)):
        decode_checkpoint(orjson.dumps(sums) + b"\n" + body)


def test_a_slot_of_a_checkpoint_is_the_one_in_the_name(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with Run(store.storage) as run:
        state = commit(store, run, write(tmp_path / "store", run.id, "tombstones", "p"))
    header, _, body = encode_checkpoint(state).partition(b"\n")
    body = body.replace(b'"slot":["p"]', b'"slot":["q"]')
    sums = {**orjson.loads(header), "sha256": hashlib.sha256(body).hexdigest()}
    with pytest.raises(CorruptError, match="columns of tombstones"):
        decode_checkpoint(orjson.dumps(sums) + b"\n" + body)


@given(st.data())
def test_a_staged_task_is_folded_or_broken(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("staged") / "store"
    store = planned_store(root)
    with Run(store.storage) as run:
        task = unit(root, run.id, "a", data.draw(st.integers(0, 1)))
        staging.stage(store.storage, task)
        path = stored_file(root, staging.staged_path(task.task))
        fields, _ = altered(data, fields_of(path))
        path.write_bytes(log.with_checksum(orjson.dumps(fields)))
        assert (task.task in staging.read_staged(store.storage)) != bool(staging.broken(store.storage))
        read(root, {"fold": lambda _: folding.fold(store, run)})
    assert api.verify_log(root).ok, "no commit that can't be read was made of it"
    remove_store(root)


@given(st.data())
def test_a_plan_can_be_read_or_is_refused(rich: Path, data: st.DataObject) -> None:
    store = Store.open(rich)
    ((_, entry),) = store.state.group("plans").items()
    content = orjson.loads(store.storage.get(entry.path))
    fields, place = altered(data, content)
    with Run(store.storage) as run:
        name = paths.FileName.new(run.id, "plans", "forged", "json")
        forged = chunk_plan.write_json_file(store, name, fields, 1)
        try:
            plan = chunk_plan.read_plan(store, forged)
            assert all(piece.weight >= 0 and plan.files[piece.file].path for unit in plan.units for piece in unit)
        except CorruptError as error:
            assert names_it(error, Path(forged.path), place) or "do not match" in str(error), error
        finally:
            store.storage.delete([forged.path])


@given(
    JUNK
    | st.fixed_dictionaries({"run": JUNK})
    | st.builds(lambda process: {**leases._here(), "process": process}, JUNK)
)
def test_a_lease_is_of_a_process_or_nobody_knows(lease: Any) -> None:
    data = orjson.dumps(lease)
    assert leases.is_here(data) in (None, True, False)
    assert re.fullmatch("([0-9a-f]{8})?", leases.claimer(SimpleNamespace(get=lambda _: data), ""))


# What is written is checked too.


@pytest.mark.parametrize(
    "fields",
    [
        {"records": {"totals": {"chunks": 1}}},
        {"records": {"plan:a/b": {}}},
        {"records": {"index:main": {"encoder": "tiny", "factory": "Flat", "target": float("nan")}}},
        {"settings": {"a": orjson.loads("[" * 40 + "]" * 40)}},
        {"remove": ("chunks/../x",)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_could_not_be_read_is_not_committed(tmp_path: Path, fields: dict[str, Any]) -> None:
    store = make_store(tmp_path / "store")
    with Run(store.storage) as run, pytest.raises(CorruptError, match=r"00000000\.json"):
        log.append(store.storage, run.id, 0, store.genesis, Draft("test", **fields))
    assert Store.open(store.place).state.number == -1


def test_a_slot_that_is_not_the_one_in_the_name_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with Run(store.storage) as run:
        for kind, slot, wrong in (
            ("tombstones", "p", "q"),
            ("chunks", "000001", "1"),
            ("embeddings", "000001", "000002"),
        ):
            entry = write(tmp_path / "store", run.id, kind, slot, name="x" if kind == "embeddings" else "")
            with pytest.raises(CorruptError, match=rf"add\[0\].slot is \"{wrong}\""):
                commit(store, run, dataclasses.replace(entry, slot=wrong))


def test_no_more_parts_are_pending_than_there_are(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with Run(store.storage) as run:
        commit(store, run, records={"parts": 3, "pending": 3})
        for records in ({"pending": 4}, {"parts": 2}, {"parts": None}):
            with pytest.raises(RetrotoolError, match="parts would be pending"):
                commit(store, run, records=records)
            assert log.append(store.storage, run.id, 1, store.state.head, Draft("test", records=records))
            with pytest.raises(CorruptError, match=r"commit 1 is invalid: .* parts would be pending"):
                Store.open(store.place)
            stored_file(tmp_path / "store", log.commit_path(1)).unlink()
    assert Store.open(store.place).state.live == 0
