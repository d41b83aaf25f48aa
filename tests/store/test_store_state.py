"""The state is the fold of the log; checkpoints and copies on the way change nothing about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_help import commit, contents, make_commit, make_store, new_token, write
from stored import stored_file, stored_files

from retrotool.errors import ConflictError, CorruptError
from retrotool.store import log
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName, part_slot
from retrotool.store.state import State, decode_checkpoint, encode_checkpoint
from retrotool.store.store import Store, newest_checkpoint

Slot = tuple[str, str, str]

SLOTS: list[Slot] = [
    *(("chunks", "", slot) for slot in ("000000", "000001", "999999", "1000000")),
    ("documents", "", "000001"),
    *(("embeddings", name, "000000") for name in ("one", "other")),
    ("tombstones", "", "p1"),
]
KEYS = ("count", "scans", "newer:one", "newer:other")
EMPTY = State(-1, "genesis")

slots = st.sets(st.sampled_from(SLOTS))
integers = st.integers(-(2**53), 2**53)
values = st.none() | integers | st.text() | st.dictionaries(st.text(), integers, max_size=3)
records = st.dictionaries(st.sampled_from(KEYS), values)


def entry(slot: Slot, number: int = 0, about: dict[str, Any] | None = None) -> FileEntry:
    kind, name, place = slot
    token = f"{SLOTS.index(slot) if slot in SLOTS else 255:02x}{number:022x}"
    path = FileName(kind, name, place, token, "parquet").path
    return FileEntry(path, place, number, 100 + number, f"{number:064x}", about)


@dataclass
class Model:
    """What a state should be: a dict of files and one of records."""

    files: dict[Slot, FileEntry] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    records: dict[str, Any] = field(default_factory=dict)

    def next(self, number: int, removed: set[Slot], added: set[Slot], records: dict[str, Any]) -> log.Commit:
        """A valid commit near to what was drawn; the model follows it."""
        remove = tuple(self.files.pop(slot).path for slot in sorted(removed & self.files.keys()))
        self.gone.update(remove)
        free = sorted(added - self.files.keys())
        add = {slot: entry(slot, number, {"n": number} if number % 2 else None) for slot in free}
        self.files.update(add)
        self.records = {k: v for k, v in {**self.records, **records}.items() if v is not None}
        return make_commit(number, remove=remove, add=tuple(add.values()), records=records)

    def check(self, state: State) -> None:
        assert sorted(e.path for e in state.files()) == sorted(e.path for e in self.files.values())
        assert not any(state.has(path) for path in self.gone)
        assert state.records == self.records
        parts = sorted(int(slot) for kind, _, slot in self.files if kind == "chunks")
        assert state.all_parts() == state.parts() == parts
        for kind, name, place in SLOTS:
            expected = self.files.get((kind, name, place))
            assert state.file(kind, place, name) == expected
            assert state.has(entry((kind, name, place), 10**6).path) is False
            if expected is not None:
                assert state.has(expected.path)
                assert state.slot_of(expected.path) == place == expected.slot
                assert expected.place == (kind, name, place)
            assert (name in state.names(kind)) == any((k, n) == (kind, name) for k, n, _ in self.files)
            group = state.group(kind, name)
            assert len(group) == len(list(group)) == sum((k, n) == (kind, name) for k, n, _ in self.files)


@given(st.lists(st.tuples(slots, slots, records, st.booleans()), max_size=20))
def test_a_fold_is_what_a_dict_would_be(drawn: list[tuple[set[Slot], set[Slot], dict[str, Any], bool]]) -> None:
    state, model = EMPTY, Model()
    for number, (removed, added, changed, through_checkpoint) in enumerate(drawn):
        before, old = contents(state), state
        state = state.fold([model.next(number, removed, added, changed)])
        model.check(state)
        assert (state.number, state.head) == (number, f"{number:064x}")
        assert contents(old) == before, "states are values"
        if through_checkpoint:
            state = decode_checkpoint(encode_checkpoint(state))
            model.check(state)
            assert (state.number, state.head) == (number, f"{number:064x}")


@given(st.lists(st.tuples(slots, slots, records), max_size=20), st.integers(0, 20))
def test_commits_can_be_folded_one_by_one_or_together(
    drawn: list[tuple[set[Slot], set[Slot], dict[str, Any]]], cut: int
) -> None:
    model = Model()
    commits = [model.next(number, *what) for number, what in enumerate(drawn)]
    halfway = EMPTY.fold(commits[:cut])
    before = contents(halfway)
    model.check(halfway.fold(commits[cut:]))
    model.check(EMPTY.fold(iter(commits)))
    with pytest.raises(CorruptError, match="commit 99 is invalid"):
        halfway.fold([*commits[cut:], make_commit(99, reads=(entry(SLOTS[0], 10**6).path,))])
    assert contents(halfway) == before, "states are values"
    assert contents(EMPTY) == ({}, {})


@given(st.lists(st.tuples(slots, slots, records), min_size=1, max_size=8), st.sampled_from(SLOTS), st.booleans())
def test_what_does_not_fit_is_refused(
    drawn: list[tuple[set[Slot], set[Slot], dict[str, Any]]], slot: Slot, twice: bool
) -> None:
    state, model = EMPTY, Model()
    for number, what in enumerate(drawn):
        state = state.fold([model.next(number, *what)])
    live, stranger = model.files.get(slot), entry(slot, 10**6)
    changes: dict[str, dict[str, Any]] = {
        "was replaced": {"reads": (stranger.path,)},
        "or removed": {"remove": (stranger.path,)},
        "is taken": {"add": (stranger, entry(slot, 10**7)) if live is None or twice else (stranger,)},
    }
    for reason, fields in changes.items():
        assert reason in str(state.conflict(Draft("test", **fields)))
        with pytest.raises(CorruptError, match=f"commit 99 is invalid.*{reason}"):
            state.fold([make_commit(99, **fields)])
    # What fits does fit.
    remove = (live.path,) if live else ()
    assert state.conflict(Draft("test", reads=remove, remove=remove, add=(stranger,))) is None


def test_a_record_is_deleted_by_null() -> None:
    state = EMPTY.fold([make_commit(0, records={"a": 1, "b": 0})]).fold([make_commit(1, records={"a": None})])
    assert state.records == {"b": 0}
    assert state.with_prefix("b") == {"": 0}


def test_parts_are_in_order_of_their_numbers() -> None:
    added = tuple(entry(slot) for slot in SLOTS[:4])
    state = EMPTY.fold([make_commit(0, add=added[::-1])])
    assert state.all_parts() == state.parts() == [0, 1, 999_999, 1_000_000]
    assert [state.part_file("chunks", part) for part in state.parts()] == list(added)
    assert [one.part for one in added] == state.parts()


def test_the_parts_of_plans_that_are_not_finished_are_pending() -> None:
    added = tuple(entry(("chunks", "", part_slot(part)), part + 1) for part in range(5))
    state = EMPTY.fold([make_commit(0, add=added, records={"parts": 5, "pending": 2})])
    for seen in (state, decode_checkpoint(encode_checkpoint(state))):
        assert (seen.all_parts(), seen.parts(), seen.live) == ([0, 1, 2, 3, 4], [0, 1, 2], 3)
        assert [seen.is_live(part) for part in (-1, 0, 2, 3, 4, 5)] == [False, True, True, False, False, False]
    finished = state.fold([make_commit(1, remove=(added[1].path,), records={"pending": 0})])
    assert finished.parts() == [0, 2, 3, 4]
    assert not finished.is_live(1)


def test_a_file_keeps_its_slot_through_a_checkpoint_whatever_its_name_says() -> None:
    """The commit has the slots of documents and chunks; that of an index is in its name, too."""
    added = (
        FileEntry("documents/0123456789abcdef01234567.parquet", "000007", 1, 1, "0" * 64),
        FileEntry("chunks/0123456789abcdef01234567.parquet", "000007", 1, 1, "0" * 64),
        FileEntry("index/main/shard-0000.g2-0123456789abcdef.faiss", "shard-0000.g2", 1, 1, "0" * 64),
    )
    state = EMPTY.fold([make_commit(0, add=added)])
    for seen in (state, decode_checkpoint(encode_checkpoint(state))):
        assert set(seen.files()) == set(added)
        for one in added:
            assert seen.slot_of(one.path) == one.slot
            assert seen.file(one.kind, one.slot, one.name) == one
        again = seen.fold([make_commit(1, remove=(added[0].path,))])
        assert again.slot_of(added[0].path) is None
        assert again.file("documents", "000007") is None
        assert again.slot_of("documents/ffffffffffffffff01234567.parquet") is None


def test_an_entry_comes_back_from_its_commit() -> None:
    for one in (entry(SLOTS[0], 3), entry(SLOTS[4], 4, {"keys": 2}), entry(("tombstones", "", "p1"))):
        assert FileEntry.from_json({**one.as_json(), "from_the_future": 1}) == one
    with pytest.raises(KeyError, match="slot"):
        FileEntry.from_json({key: value for key, value in entry(SLOTS[0]).as_json().items() if key != "slot"})


def test_two_files_of_a_kind_can_not_have_one_slot_though_their_names_do_not_say_it() -> None:
    slot = SLOTS[0]
    one, other = entry(slot, 1), entry(slot, 2)
    assert one.path != other.path
    with pytest.raises(CorruptError, match="is taken"):
        EMPTY.fold([make_commit(0, add=(one, other))])
    state = EMPTY.fold([make_commit(0, add=(one,)), make_commit(1, add=(other,), remove=(one.path,))])
    assert state.slot_of(other.path) == slot[2]
    assert state.slot_of(one.path) is None


def test_no_flipped_bit_makes_another_state_of_a_checkpoint() -> None:
    state = EMPTY.fold([make_commit(7, add=tuple(map(entry, SLOTS)), records={"count": {"chunks": 5}})])
    data = bytearray(encode_checkpoint(state))
    assert contents(decode_checkpoint(bytes(data))) == contents(state)
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            found = decode_checkpoint(bytes(data))
            # The header's number and head are compared with the log by who opens it.
            lies = found is not None and (found.number, found.head) != (state.number, state.head)
            assert found is None or lies or contents(found) == contents(state), (place, bit)
            data[place] ^= 1 << bit


@pytest.mark.parametrize("data", [b"", b"\n", b"{}\n{}", b"[]\n", b"1\n2", b"null\nnull", b"\xff\n\xff"])
def test_what_is_no_checkpoint_is_none(data: bytes) -> None:
    assert decode_checkpoint(data) is None


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_truncated_checkpoint_is_none(keep: int) -> None:
    state = EMPTY.fold([make_commit(7, add=tuple(map(entry, SLOTS)))])
    assert decode_checkpoint(encode_checkpoint(state)[:keep]) is None


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with commits 0 to 21, and checkpoints of 16 and 20."""
    monkeypatch.setattr("retrotool.store.store.CHECKPOINT_EVERY", 4)
    store = make_store(tmp_path / "store")
    with Run(store.storage) as run:
        for number in range(22):
            added = write(Path(store.place), run.id, "tombstones", f"p{number}")
            old = store.state.file("tombstones", f"p{number - 3}")
            commit(store, run, added, remove=(old.path,) if old else (), records={f"n{number % 5}": number})
    return store


def checkpoints(store: Store) -> list[Path]:
    return stored_files(store, "checkpoints/*")


def commits_read_to_open(root: Path) -> tuple[State, list[int]]:
    with mock.patch("retrotool.store.log.get_if_there", wraps=log.get_if_there) as read:
        state = Store.open(root).state
    return state, [int(Path(call.args[1]).stem) for call in read.call_args_list]


def fold_of_log(store: Store) -> State:
    state = State(-1, store.genesis)
    while (found := log.read(store.storage, state.number + 1, state.head)) is not None:
        state = state.fold([found])
    return state


def test_the_last_two_checkpoints_are_kept(store: Store) -> None:
    assert [path.name.partition("-")[0] for path in checkpoints(store)] == ["00000016", "00000020"]


def test_opening_reads_the_newest_checkpoint_and_the_commits_after_it(store: Store) -> None:
    state, numbers = commits_read_to_open(Path(store.place))
    assert contents(state) == contents(fold_of_log(store)) == contents(store.state)
    assert (state.number, state.head) == (21, store.state.head)
    assert numbers == [20, 21, 22]


def test_without_checkpoints_the_log_is_folded_from_its_beginning(store: Store) -> None:
    for path in checkpoints(store):
        path.unlink()
    state, numbers = commits_read_to_open(Path(store.place))
    assert contents(state) == contents(store.state)
    assert numbers == list(range(23))


@pytest.mark.parametrize("damage", [b"", b"{}\n{}", b"garbage"])
def test_a_broken_checkpoint_is_passed_over_for_an_older_one(store: Store, damage: bytes) -> None:
    checkpoints(store)[-1].write_bytes(damage)
    state, numbers = commits_read_to_open(Path(store.place))
    assert contents(state) == contents(store.state)
    assert numbers == [16, 17, 18, 19, 20, 21, 22]
    checkpoints(store)[0].write_bytes(damage)
    assert contents(Store.open(store.place).state) == contents(store.state)
    assert newest_checkpoint(store.storage) is None


@pytest.mark.parametrize("number", [20, 21, 22, 1000])
def test_a_checkpoint_of_a_commit_that_is_not_in_the_log_is_ignored(store: Store, number: int) -> None:
    lie = EMPTY.fold([make_commit(number, add=(entry(SLOTS[0]),))])
    path = stored_file(store, f"checkpoints/{number:08d}-{new_token()}.json")
    path.write_bytes(encode_checkpoint(lie))
    assert contents(Store.open(store.place).state) == contents(store.state)


def test_other_files_among_the_checkpoints_are_ignored(store: Store) -> None:
    for name in ("notes.txt", ".tmp-0123abcd00001234", "99999999.json"):
        stored_file(store, f"checkpoints/{name}").write_bytes(b"?")
    assert contents(Store.open(store.place).state) == contents(store.state)


def test_a_store_committed_to_after_its_checkpoint_was_lost_goes_on(store: Store) -> None:
    for path in checkpoints(store):
        path.unlink()
    opened = Store.open(store.place)
    with Run(store.storage) as run:
        for number in range(22, 26):
            commit(opened, run, records={"n": number})
    assert [path.name.partition("-")[0] for path in checkpoints(store)] == ["00000024"]
    assert contents(store.refresh()) == contents(Store.open(store.place).state)


def test_a_draft_that_was_overtaken_is_refused_and_nothing_is_committed(store: Store) -> None:
    with Run(store.storage) as run, pytest.raises(ConflictError, match=r"test: .*was replaced or removed"):
        commit(store, run, reads=(entry(SLOTS[0]).path,))
    assert Store.open(store.place).state.number == 21


def test_the_files_a_commit_removes_are_unlinked(store: Store) -> None:
    names = {path.name for path in stored_files(store, "tombstones/*")}
    assert names == {FileName.parse(e.path).path.rpartition("/")[2] for e in store.state.files()}
    assert len(names) == 3
