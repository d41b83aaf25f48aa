"""Check the references between a store's files: embeddings, indexes, neighbour tables, block lists, records.

Used by ``verify``. Files are read part by part, or shard by shard, in blocks. Vectors in indexes, distances,
and tokens in neighbour tables are checked by sampling; the file's hash is the seed, so the same file always
gives the same result. Databases in other stores are not read. Memory: one table, or the ids of one shard, and
what ``Checked`` holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.ann.lists import InvertedLists, read_lists
from retrotool.errors import CorruptError, ErasedError, RetrotoolError
from retrotool.index.index_files import read_trained
from retrotool.index.index_records import RECALL, SHARD, IndexFiles
from retrotool.info.problems import Problem, problem_with
from retrotool.store import neighbour_tables, parts
from retrotool.store.blocked import read_hashes
from retrotool.store.log import FileEntry
from retrotool.store.neighbour_tables import ERASED, NO_NEIGHBOUR, NeighbourTable, NeighbourText, is_within
from retrotool.store.parts import ROW_GROUP, Ids, distinct_parts, join_id, part_of, row_of, rows_by_part, slice_of_part
from retrotool.store.paths import generation_in, part_slot
from retrotool.store.store import Store
from retrotool.store.tombstones import KEPT, Tombstones, named_chunks, undone_chunks, undone_purges
from retrotool.store.vectors import not_finite, read_vectors

_BLOCK = 1 << 16
_SAMPLED_VECTORS = 256
_SAMPLED_ROWS = 16
_ROUNDING = 5e-4  # allowed error of a distance computed in float32, as a share of the two squared norms
_INFINITE = 0x7C00  # smallest bits of a float16, without its sign, that are infinite or NaN


class Checked:
    """A store that is being checked, its problems, and what the checks share."""

    def __init__(self, store: Store, problems: list[Problem]) -> None:
        self.store, self.problems = store, problems
        self.recorded, self.broken = set[str](), set[str]()  # keys of all records ever set, paths of damaged files
        self.tombstones = Tombstones(np.zeros(0, np.int64))
        self.zeros: dict[str, Ids] = {}  # by path of embeddings, the rows of live or purged keys with a zero vector
        self._keys: dict[int, npt.NDArray[np.uint8]] = {}
        entries = {entry.part: entry for entry in store.state.group("chunks").entries()}
        self._parts = np.array([-1, *entries])
        self._rows = np.array([0, *(entry.rows for entry in entries.values())])
        self._with_values = {part for part, entry in entries.items() if parts.n_keys(entry) < entry.rows}

    def add(self, path: str, text: str) -> None:
        """Add a problem with a file; ``path`` "": with the records of the log."""
        self.problems.append(problem_with(self.store, path, text))

    def note(self, path: str, wrong: Mapping[str, object], what: str = "") -> None:
        """Add a problem with a file, which is called ``what``, for each sentence whose value is true."""
        for sentence in (sentence for sentence, is_true in wrong.items() if is_true):
            self.add(path, f"{what or path}: {sentence}")

    @contextmanager
    def noting(self, path: str, what: str = "") -> Iterator[None]:
        """Turn errors into a problem with a file, as a broken file can break anything that reads it.

        Lets ``ErasedError`` pass: a newer commit removed the file that was being read.
        """
        try:
            yield
        except ErasedError:
            raise
        except RetrotoolError as error:
            self.add(path, str(error))
        except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, pa.ArrowException) as error:
            self.add(path, f"{what or path}: can't be checked: {type(error).__name__}: {error}")

    @cached_property
    def erasing(self) -> Tombstones:
        """Chunks of purges that are not erased yet; an erase of these may be running, or was interrupted."""
        return Tombstones(np.setdiff1d(self._named_by(erased=False), self.erased.ids))

    @cached_property
    def erased(self) -> Tombstones:
        """Chunks of erased purges, which must not be in any file."""
        return Tombstones(self._named_by(erased=True))

    def _named_by(self, *, erased: bool) -> Ids:
        state = self.store.state
        purges = {purge for purge, record in state.with_prefix("purge:").items() if record["erased"] == erased}
        return named_chunks(self.store, [one for one in state.group("tombstones") if one.partition(".")[0] in purges])

    def rows_of(self, numbers: Ids) -> Ids:
        """Return the number of rows of each part, int64 [n]; 0 for parts that don't exist."""
        place = np.minimum(np.searchsorted(self._parts, numbers), len(self._parts) - 1)
        return np.where(self._parts[place] == numbers, self._rows[place], 0)

    def whole(self, kind: str, part: int, name: str = "") -> FileEntry | None:
        """Return a part's file, None if it is missing or broken."""
        entry = self.store.state.part_file(kind, part, name)
        return None if entry is None or entry.path in self.broken else entry

    def are_keys(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which ids, all of them rows of parts, are not values of key-value records, bool [n]."""
        keys = np.ones(len(ids), np.bool_)
        if not self._with_values:
            return keys
        of = part_of(ids)
        for part in self._with_values.intersection(np.unique(of).tolist()):
            if self.whole("chunks", part) is None:
                continue
            if part not in self._keys:
                self._keys[part] = np.packbits(parts.read_key(self.store, part))
            mine = of == part
            rows = row_of(ids[mine])
            keys[mine] = (self._keys[part][rows >> 3] << (rows & 7) & 0x80) > 0
        return keys


def check_chunk_ids(checked: Checked, ids: Ids, path: str, what: str = "") -> bool:
    """Return whether all ``ids`` are rows of parts; add a problem if not."""
    known = (ids >= 0) & (row_of(ids) < checked.rows_of(part_of(ids)))
    if not known.all():
        unknown = int((~known).sum())
        checked.add(path, f"{what or path}: ids that are not chunks of the store: {unknown:,}")
    return bool(known.all())


def check_records(checked: Checked) -> None:
    """Check mixtures, and that files have their records; an unfinished index or table may have none yet."""
    state = checked.store.state
    for kind, prefix in (("embeddings", "encoder:"), ("index", "index:"), ("neighbours", "neighbours:")):
        for name in state.names(kind):
            key = prefix + name
            measured = kind == "index" and state.file(kind, RECALL, name) is not None
            if key not in state.records and (kind == "embeddings" or measured or key in checked.recorded):
                checked.add("", f"{kind} {name}: it has files, but the record {key!r} is missing")
    records = state.with_prefix("neighbours:")
    for name, record in records.items():
        if "mix" not in record:
            continue
        tables = [str(member["table"]) for member in record["mix"]]
        databases = [records[table]["database"] for table in tables if "database" in records.get(table, {})]
        wrong = {
            "the mixture names a table that doesn't exist": len(databases) < len(tables),
            "the mixture has no tables, or two of the same database": not 0 < len(set(databases)) == len(databases),
            "the mixture has a weight that is not a positive number": any(one["weight"] <= 0 for one in record["mix"]),
        }
        checked.note("", wrong, f"neighbours {name}")


def check_blocked(checked: Checked) -> None:
    """Check that block lists are readable and belong to purges."""
    for slot, entry in checked.store.state.group("blocked").items():
        if f"purge:{slot}" not in checked.store.state.records:
            checked.add(entry.path, f"{entry.path}: purge {slot} doesn't exist")
        if entry.path not in checked.broken:
            with checked.noting(entry.path):
                read_hashes(checked.store, entry)


def check_undone(checked: Checked) -> None:
    """Check that undone purges have only their lists of chunks left."""
    state = checked.store.state
    undone = undone_purges(state)
    for purge, record in undone.items():
        for kind in ("tombstones", "blocked", "selectors"):
            if any(slot.partition(".")[0] == purge for slot in state.group(kind)):
                checked.add("", f"purge {purge} was undone, but still has a file in {kind}/")
        if record["erased"]:
            checked.add("", f"purge {purge} was undone, but is recorded as erased")
    for slot, entry in state.group(KEPT).items():
        if slot.partition(".")[0] not in undone:
            checked.add("", f"{KEPT}/{slot}: it does not belong to an undone purge")
        elif entry.path not in checked.broken:
            with checked.noting(entry.path):
                check_chunk_ids(checked, undone_chunks(checked.store, slot), entry.path)


def check_embeddings(checked: Checked, part: int, embedded: npt.NDArray[np.bool_]) -> None:
    """Check that a part's embeddings have vectors for exactly the rows ``embedded``, bool [n]."""
    for encoder in checked.store.state.names("embeddings"):
        entry = checked.whole("embeddings", part, encoder)
        if entry is not None:
            with checked.noting(entry.path):
                _check_vectors(checked, encoder, entry, embedded)


def _check_vectors(checked: Checked, encoder: str, entry: FileEntry, embedded: npt.NDArray[np.bool_]) -> None:
    store = checked.store
    matrix = np.asarray(read_vectors(store, entry))
    record = store.state.records.get(f"encoder:{encoder}", {})
    if len(matrix) != len(embedded):
        checked.add(entry.path, f"{entry.path}: {len(matrix):,} rows for {len(embedded):,} chunks")
        return
    if matrix.shape[1] != (dimension := record.get("dimension", matrix.shape[1])):
        what = f"{matrix.shape[1]:,} dimensions, but its encoder has {dimension:,}"
        checked.add(entry.path, f"{entry.path}: {what}")
    largest = np.zeros(len(matrix), np.uint16)
    for start in range(0, len(matrix), _BLOCK):  # the file may be larger than memory
        block = matrix[start : start + _BLOCK].view(np.uint16) & 0x7FFF
        largest[start : start + _BLOCK] = block.max(axis=1, initial=0)
    zero, infinite = (largest == 0) & embedded, np.flatnonzero(largest >= _INFINITE)
    checked.zeros[entry.path] = np.flatnonzero(zero)
    same = record.get("tokenizer") == store.identity.tokenizer.sha256
    # Another tokenizer may give no tokens for a text, such as white space. Then its vector is zero.
    # So is that of a purged chunk that none was given for.
    nothing = zero.any() if same else embedded.any() and (zero == embedded).all() and not record.get("foreign")
    wrong = {
        not_finite(entry.part, infinite): len(infinite),
        "a chunk that is erased or not a key has a vector": ((largest > 0) & ~embedded).any(),
        "a key that is not erased has a zero vector": nothing,
    }
    checked.note(entry.path, wrong)


def check_index(checked: Checked, name: str) -> None:
    """Check that shards have all live embedded chunks of their parts, and no erased ones."""
    everything: dict[int, set[int]] = {}
    for slot, entry in checked.store.state.group("index", name).items():
        if not slot.startswith(SHARD):
            continue
        covered = set((entry.about or {}).get("parts", ()))
        held = everything.setdefault(generation_in(slot), set())
        if not held.isdisjoint(covered):
            checked.add(entry.path, f"{entry.path}: has parts that another shard has too")
        held |= covered
        if entry.path not in checked.broken:
            with checked.noting(entry.path):
                _check_shard(checked, name, entry, sorted(covered))


def _check_shard(checked: Checked, name: str, entry: FileEntry, covered: list[int]) -> None:
    trained, generation = None, generation_in(entry.slot)
    # A broken training file is a problem of its own; shards are still readable without it.
    with suppress(CorruptError):
        trained = read_trained(checked.store, name, generation)[1]
    with checked.store.reading(entry) as storage:
        shard = read_lists(storage.local(entry.path), trained)
    ids = np.sort(np.concatenate([np.zeros(0, np.int64), *map(shard.ids, shard.numbers)]))
    if len(ids) != entry.rows:
        checked.add(entry.path, f"{entry.path}: has {len(ids):,} vectors, but the log says {entry.rows:,}")
    if not check_chunk_ids(checked, ids, entry.path):
        return
    encoder = IndexFiles(checked.store.state, name, generation).encoder or ""
    expected = missing = unembedded = 0
    for part in covered:
        if not checked.rows_of(np.array([part]))[0]:
            checked.add(entry.path, f"{entry.path}: lists part {part}, which doesn't exist")
            continue
        own = ids[slice_of_part(ids, part)]
        expected += len(own)
        if checked.whole("chunks", part) is None:
            continue
        embedded = parts.read_embedded(checked.store, part)
        rows = row_of(own)
        # An erase rewrites parts and shards one after another.
        unembedded += int((~checked.erasing.contains(own[~embedded[rows]])).sum())
        embedded[checked.tombstones.rows(part)] = False
        vectors_of = checked.store.state.part_file("embeddings", part, encoder)
        embedded[checked.zeros.get(vectors_of.path if vectors_of else "", np.zeros(0, np.int64))] = False
        embedded[rows] = False
        missing += int(embedded.sum())
    wrong = {
        "has a chunk twice": bool((ids[1:] == ids[:-1]).any()),
        "has chunks that are erased or not keys": unembedded > 0,
        "has chunks of parts that it does not list": expected < len(ids),
        f"chunks of its parts are missing: {missing:,}": missing > 0,
        "has vectors that differ from the embeddings": not _same_vectors(checked, encoder, entry, shard),
    }
    checked.note(entry.path, wrong)


def _same_vectors(checked: Checked, encoder: str, entry: FileEntry, shard: InvertedLists) -> bool:
    sizes = np.array([shard.size(number) for number in shard.numbers], np.int64)
    drawn = np.sort(_draw(entry).choice(len(shard), min(len(shard), _SAMPLED_VECTORS), replace=False))
    numbers = np.searchsorted(sizes.cumsum(), drawn, "right")
    rows = drawn - (sizes.cumsum() - sizes)[numbers]
    chunks = [int(shard.ids(number)[row]) for number, row in zip(numbers.tolist(), rows, strict=True)]
    stored = _vectors(checked, encoder, chunks)
    known = np.array([chunk in stored for chunk in chunks], np.bool_)
    for number in np.unique(numbers[known]).tolist():
        some = np.flatnonzero(known & (numbers == number))
        if not shard.may_stand_for(number, rows[some], np.stack([stored[chunks[i]] for i in some])):
            return False
    return True


def _draw(entry: FileEntry) -> np.random.Generator:
    return np.random.default_rng(int(entry.sha256[:16], 16))


def _vectors(checked: Checked, encoder: str, chunks: Iterable[int]) -> dict[int, npt.NDArray[np.float16]]:
    """Return the stored vectors, float16 [d] each, of chunks that are not erased nor in a broken file."""
    found = {}
    for part, rows in rows_by_part(np.unique(np.fromiter(chunks, np.int64))):
        entry = checked.whole("embeddings", part, encoder)
        if entry is None:
            continue
        matrix = read_vectors(checked.store, entry)
        for row in rows.tolist():
            if row < entry.rows and matrix[row].any():
                found[join_id(part, row)] = np.array(matrix[row])
    return found


def check_neighbours(checked: Checked) -> tuple[str, str]:
    """Check the neighbour tables; return the digest of their ids and distances, and that of their tokens."""
    lines, texts = [], []
    for name in checked.store.state.names("neighbours"):
        for slot, entry in checked.store.state.group("neighbours", name).items():
            if entry.path in checked.broken:
                continue
            with checked.noting(entry.path):
                table = neighbour_tables.read_table(checked.store, entry)
                digest = hashlib.blake2b(np.ascontiguousarray(table.ids, "<i8").data, digest_size=32)
                digest.update(np.ascontiguousarray(table.distances, "<f4").data)
                file = f"neighbours/{name}/{slot}"
                lines.append(f"{file} {digest.hexdigest()}")
                _check_table(checked, entry, name, table)
                if neighbour_tables.text_size(entry):
                    within = is_within(checked.store, entry, parts.read_schema(checked.store, entry).metadata)
                    texts.append(f"{file} {check_neighbour_text(checked, entry, table, within=within)}")
    return lines_digest(lines) if lines else "", lines_digest(texts) if texts else ""


def lines_digest(lines: Iterable[str]) -> str:
    """Compute the BLAKE2b-256 of sorted lines."""
    return hashlib.blake2b("".join(f"{line}\n" for line in sorted(lines)).encode(), digest_size=32).hexdigest()


def _check_table(checked: Checked, entry: FileEntry, name: str, table: NeighbourTable) -> None:
    store, part = checked.store, entry.part
    record = store.state.records.get(f"neighbours:{name}", {})
    metadata = parts.read_schema(store, entry).metadata or {}
    database = metadata.get(b"retrotool.database", b"").decode()
    if database != record.get("database", database):
        checked.add(entry.path, f"{entry.path}: its database is not that of its record")
    chunks = store.state.file("chunks", part_slot(part))
    if chunks is None or table.ids.shape != table.distances.shape or len(table.ids) != chunks.rows:
        checked.add(entry.path, f"{entry.path}: its {len(table.ids):,} rows don't match its part")
        return
    found: set[str] = set()
    if chunks.path not in checked.broken and (table.ids[~parts.read_key(store, part)] != NO_NEIGHBOUR).any():
        found.add("a chunk that is not a key has neighbours")
    within = is_within(store, entry, metadata)
    own = _documents_of_rows(checked, part) if within else None
    known = True
    for start in range(0, len(table.ids), _BLOCK):
        rows = slice(start, start + _BLOCK)
        found |= _problems_of_rows(table.ids[rows], table.distances[rows])
        if own is not None and ((table.ids[rows] >= own[0][rows]) & (table.ids[rows] <= own[1][rows])).any():
            found.add("a chunk has a neighbour in its own document")
        if within and known:
            ids = table.ids[rows]
            ids = ids[ids >= 0]
            known = check_chunk_ids(checked, ids, entry.path)
            if known and not checked.are_keys(ids).all():
                found.add("a neighbour is not a key")
    if within and known and "encoder" in record and not found:
        wrong, sampled = _wrong_distances(checked, str(record["encoder"]), entry, part, table)
        if wrong:
            found.add(f"{wrong:,} of {sampled:,} sampled distances are not those of the vectors")
    checked.note(entry.path, dict.fromkeys(sorted(found), True))


def _problems_of_rows(ids: Ids, distances: npt.NDArray[np.float32]) -> set[str]:
    ordered = np.sort(ids, axis=1)
    checks = {
        "distances do not ascend": not (distances[:, 1:] >= distances[:, :-1]).all(),
        "a distance is negative or not a number": not (distances >= 0).all(),
        "an id is negative": (ids < NO_NEIGHBOUR).any(),
        "a neighbour has no distance, or an empty place has one": (
            (ids == NO_NEIGHBOUR) != np.isposinf(distances)
        ).any(),
        "a row has a neighbour twice": ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(),
    }
    return {what for what, found in checks.items() if found}


def _documents_of_rows(checked: Checked, part: int) -> tuple[Ids, Ids] | None:
    """Return first and last chunk id of each row's document, [n, 1] each; None if documents are damaged."""
    if checked.whole("documents", part) is None:
        return None
    table = parts.read_documents(checked.store, part, ["first_row", "n_chunks"])
    first, count = parts.chunk_ids(part, table["first_row"].to_numpy()), table["n_chunks"].to_numpy()
    if count.sum() != checked.rows_of(np.array([part]))[0] or (count < 0).any():
        return None
    return np.repeat(first, count)[:, None], np.repeat(first + count - 1, count)[:, None]


def _wrong_distances(
    checked: Checked, encoder: str, entry: FileEntry, part: int, table: NeighbourTable
) -> tuple[int, int]:
    """Compute a sample of the distances again; return how many are wrong, and the size of the sample."""
    asking = np.flatnonzero((table.ids != NO_NEIGHBOUR).any(axis=1))
    rows = _draw(entry).choice(asking, min(len(asking), _SAMPLED_ROWS), replace=False).tolist()
    named = [chunk for row in rows for chunk in table.ids[row].tolist() if chunk != NO_NEIGHBOUR]
    stored = _vectors(checked, encoder, [*(join_id(part, row) for row in rows), *named])
    wrong = sampled = 0
    for row in rows:
        query = stored.get(join_id(part, row))
        if query is None:
            continue
        for chunk, distance in zip(table.ids[row].tolist(), table.distances[row].tolist(), strict=True):
            other = stored.get(chunk)
            if other is None:  # no neighbour, or erased since
                continue
            one, two = query.astype(np.float64), other.astype(np.float64)
            sampled += 1
            wrong += abs(((one - two) ** 2).sum() - distance) > _ROUNDING * ((one**2).sum() + (two**2).sum())
    return wrong, sampled


def check_neighbour_text(checked: Checked, entry: FileEntry, table: NeighbourTable, *, within: bool) -> str:
    """Check the tokens of neighbours that a table stores; return their digest."""
    digest, found = hashlib.blake2b(digest_size=32), set[str]()
    drawn = _draw(entry).choice(entry.rows, min(entry.rows, _SAMPLED_ROWS), replace=False)
    for group in range(-(-entry.rows // ROW_GROUP)):
        rows = slice(group * ROW_GROUP, (group + 1) * ROW_GROUP)
        text = neighbour_tables.read_text(checked.store, entry, [group])
        for values in (text.ids, text.distances, text.n_tokens, text.tokens):
            digest.update(np.ascontiguousarray(values).data)
        found |= _problems_of_text(text, table.ids[rows])
        if within and not found:
            some = drawn[(drawn >= rows.start) & (drawn < rows.stop)] - rows.start
            found |= _not_of_chunks(checked, entry, text, some)
    checked.note(entry.path, dict.fromkeys(sorted(found), True))
    return digest.hexdigest()


def _problems_of_text(text: NeighbourText, saved: Ids) -> set[str]:
    """Check the tokens of rows whose neighbours are ``saved`` [n, saved], without reading chunks."""
    ids, counts = text.ids, text.n_tokens
    none, length = ids == NO_NEIGHBOUR, text.tokens.shape[3]
    # Replace what is not an id by values that are all different.
    ordered = np.sort(np.where(ids < 0, ERASED - np.arange(ids.shape[1]), ids), axis=1)
    named = (ids[:, :, None] == saved[:, None, :]).any(axis=2)
    checks = {
        "the id of a text is negative": (ids < ERASED).any(),
        "a text follows an empty place": (none[:, :-1] & ~none[:, 1:]).any(),
        "a row has the text of a neighbour twice": (ordered[:, 1:] == ordered[:, :-1]).any(),
        "a row has the text of a chunk that is not its neighbour": ((ids >= 0) & ~named).any(),
        "a neighbour with a text has no distance, or an empty place has one": (
            (ids >= 0) != np.isfinite(text.distances)
        ).any(),
        "a text has more tokens than a chunk can": ((counts < 0) | (counts > length)).any(),
        "a neighbour has no tokens, or an empty place has some": ((counts[:, :, 0] > 0) != (ids >= 0)).any(),
        "a continuation has no neighbour": ((counts[:, :, 1] > 0) & (ids < 0)).any(),
        "the padding of a text is not zero": (text.tokens * (np.arange(length) >= counts[..., None])).any(),
    }
    return {what for what, found in checks.items() if found}


def _not_of_chunks(checked: Checked, entry: FileEntry, text: NeighbourText, rows: Ids) -> set[str]:
    """Check text of chunks of the store itself: all ids, and the tokens of ``rows``."""
    mine = text.ids >= 0
    follows = mine & (text.n_tokens[:, :, 1] > 0)
    ids, following = text.ids[mine], text.ids[follows] + 1
    if not (check_chunk_ids(checked, ids, entry.path) and check_chunk_ids(checked, following, entry.path)):
        return set()
    found: set[str] = set()
    if checked.erased.contains(ids).any() or checked.erased.contains(following).any():
        found.add("it has tokens of erased chunks")
    if not _have_tokens(checked, text.ids[rows], text.tokens[rows], text.n_tokens[rows]):
        found.add("tokens differ from those of the chunks")
    return found


def _have_tokens(checked: Checked, ids: Ids, tokens: npt.NDArray[Any], counts: npt.NDArray[np.int32]) -> bool:
    """Return whether tokens [n, k, 2, length] are those of chunks [n, k] and of the chunks after them.

    Erased chunks, whose tokens are unknown, are ignored.
    """
    whole = [part for part in distinct_parts(ids[ids >= 0]) if checked.whole("chunks", part) is not None]
    present = (np.isin(part_of(ids), whole) & (ids >= 0))[:, :, None] & (counts > 0)
    own, counts, tokens = (ids[:, :, None] + np.arange(2))[present], counts[present], tokens[present]
    follows = np.nonzero(present)[2] == 1
    for some, chunks, rows in parts.read_groups_of(checked.store, own):
        stored = chunks.n_tokens[rows]
        same = (stored == counts[some]) & (chunks.tokens[rows] == tokens[some]).all(axis=1)
        if ((stored > 0) & ~same | follows[some] & (chunks.index[rows] == 0)).any():
            return False
    return True
