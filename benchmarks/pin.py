"""Record what retrotool does with real text, and compare another revision with the recording.

    python benchmarks/pin.py corpus CORPUS INPUT.jsonl[.zst] ... [--megabytes 60]
    PYTHONPATH=CHECKOUT python benchmarks/pin.py record FILE CORPUS
    PYTHONPATH=CHECKOUT python benchmarks/pin.py compare FILE CORPUS [--known PREFIX ...]

``corpus`` draws documents from JSON lines with ``id``, ``text`` and ``source``, and writes them in every
input format, with documents that repeat by id and by text, and with damaged lines. It also writes smaller
texts for growth, evaluation, key-value records and searches by pattern, two small encoders and a tokenizer.

``record`` runs chunk, embed, index, neighbours, search, export, RetroDataset, purge, undo, erase and verify,
through the command line of the retrotool in PYTHONPATH, on one core. It records digests of the stores
(``plain_store.py`` reads them without retrotool), exit codes and printed text.

``compare`` runs the same and exits with 1 if a digest, count or exit code differs. Other printed text, and
new or missing columns, are only shown. ``--known`` allows an intended change; it takes the beginning of a
name, such as ``content/after an erase``. A corpus with other bytes is refused.

The vectors of the encoder ``exact`` are the same on every machine. Trained indexes, what is found through
them, and the vectors of ``random`` are the same on machines with the same kernels, so the recording names its
machine. A run takes about 20 minutes of CPU time for 60 MB.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from exact_encoder import common_words, make_encoder
from machine import describe
from plain_store import Digest, PlainStore

LIBRARIES = ("numpy", "torch", "faiss-cpu", "pyarrow", "tokenizers", "tokie", "transformers")
FREE = ("outputs/", "machine", "revision", "libraries")
"""Prefixes of names that may differ."""
OPTIONAL = re.compile(r"columns of documents|verify/(?!content|ids|tombstones)|exported columns")
"""Names that may be missing on one side, depending on the layout, and must otherwise be equal."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text of the corpus."""

    id: str
    text: str
    source: str

    def row(self) -> dict[str, Any]:
        year = 1990 + int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=2).digest()) % 35
        return {**asdict(self), "year": str(year)}


# The corpus


def read_documents(files: Iterable[str], megabytes: float) -> Iterator[Document]:
    """Yield about so many megabytes of documents of JSON-lines files, drawn by the hashes of their ids."""
    rows = [row for file in files for row in _rows(Path(file)) if len(row["text"]) < 1_000_000]
    share = megabytes * 1e6 / max(1, sum(len(row["text"].encode()) for row in rows))
    for row in rows:
        if _draw(row["id"], "take") < share:
            yield Document(row["id"], row["text"], row.get("source", ""))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".zst":
        with zstandard.open(file, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _draw(document: str, what: str) -> float:
    """Return a number from 0 to 1 derived from a document's id."""
    drawn = hashlib.blake2b(f"{what}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) / 2**64


def write_corpus(root: Path, documents: Sequence[Document], *, words: int = 8000) -> None:
    """Write a corpus folder of some documents; ``words`` is the size of the encoders' vocabulary."""
    roles: dict[str, list[Document]] = {"input": [], "extra": [], "evaluation": [], "pairs": [], "bytes": []}
    limits = {"extra": 0.05, "evaluation": 0.07, "pairs": 0.08, "bytes": 0.14, "input": 1.0}
    for document in documents:
        drawn = _draw(document.id, "role")
        roles[next(role for role, limit in limits.items() if drawn < limit)].append(document)
    # Some evaluation texts are in the corpus except for a line, for --contaminates.
    copied = [document for document in roles["evaluation"] if _draw(document.id, "copied") < 0.2]
    roles["extra"] += [Document(f"{one.id}/copy", f"A copy.\n{one.text}", one.source) for one in copied]
    root.mkdir(parents=True)
    write_formats(root / "input", roles["input"])
    for role in ("extra", "evaluation", "bytes"):
        _write_lines(root / f"{role}.jsonl", (document.row() for document in roles[role]))
    _write_lines(root / "pairs.jsonl", map(_pair, roles["pairs"]))
    vocabulary = common_words((document.text for document in documents), words)
    make_encoder(root / "exact", vocabulary)
    make_encoder(root / "random", vocabulary, layers=2, exact=False)
    _write_tokenizer(root / "bytes.json", [document.text for document in roles["bytes"]])


def _pair(document: Document) -> dict[str, str]:
    question, _, answer = document.text.partition("\n")
    return {"id": document.id, "question": question[:300] or "?", "answer": answer, "source": document.source}


def write_formats(root: Path, documents: Sequence[Document]) -> None:
    """Write files of every input format. Some documents repeat, by id in ``.gz`` and by text in ``.zst``."""
    root.mkdir()
    formats: list[list[Document]] = [[] for _ in range(8)]
    for document in documents:
        formats[int(8 * _draw(document.id, "format"))].append(document)
    lines, packed, zipped, table, columns, arrow, texts, damaged = formats
    packed += [Document(f"{d.id}/again", d.text, d.source) for d in documents if _draw(d.id, "text") < 0.01]
    zipped += [Document(d.id, f"{d.text}\nMore.", d.source) for d in documents if _draw(d.id, "id") < 0.01]
    _write_lines(root / "a.jsonl", (document.row() for document in lines))
    compressor = zstandard.ZstdCompressor()
    (root / "b.jsonl.zst").write_bytes(compressor.compress(_lines(document.row() for document in packed)))
    (root / "c.jsonl.gz").write_bytes(gzip.compress(_lines(document.row() for document in zipped), 6, mtime=0))
    with (root / "d.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text", "source", "year"])
        writer.writeheader()
        # A csv file has one kind of line end; others in the text are not tested here.
        writer.writerows({**d.row(), "text": d.text.replace("\r", "").replace("\0", "")} for d in table)
    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "source", "year")])
    pq.write_table(pa.Table.from_pylist([d.row() for d in columns], schema), root / "e.parquet", row_group_size=500)
    with pa.ipc.new_file(root / "f.arrow", schema) as sink:
        sink.write_table(pa.Table.from_pylist([d.row() for d in arrow], schema), max_chunksize=500)
    (root / "texts").mkdir()
    for i, document in enumerate(texts):
        (root / "texts" / f"{i:06d}.txt").write_text(document.text, encoding="utf-8", newline="")
    (root / "g.jsonl").write_bytes(b"".join(_damaged(i, document) for i, document in enumerate(damaged)))


def _damaged(i: int, document: Document) -> bytes:
    """Return a document's line; one of ten is damaged."""
    line = json.dumps(document.row()).encode()
    broken = (
        line[: len(line) // 2],
        json.dumps({"id": document.id, "body": "no text"}).encode(),
        json.dumps({**document.row(), "text": 17}).encode(),
        line.replace(b" ", b"\xff", 1),
        json.dumps({**document.row(), "text": None}).encode(),
        json.dumps({**document.row(), "text": ""}).encode(),
        b"[1, 2]",
    )
    return (broken[i // 10 % len(broken)] if i % 10 == 9 else line) + b"\n"


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_bytes(_lines(rows))


def _write_tokenizer(path: Path, texts: list[str]) -> None:
    """Write a lossless byte-level BPE of 4,000 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def corpus_digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


# Running commands

Runner = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs retrotool with some arguments, and captures what it prints as text."""


def run_retrotool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the retrotool of PYTHONPATH in a separate process, on one core."""
    one_core = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    command = [sys.executable, "-P", "-m", "retrotool", *map(str, arguments)]  # -P: not that of this folder
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one_core}, check=False)


@dataclass(frozen=True, slots=True)
class Spelling:
    """Maps commands to their spelling in a revision with these ``commands``."""

    commands: frozenset[str]
    sample: str
    """The option of ``index`` for the number of chunks to measure recall with."""

    @classmethod
    def of(cls, run: Runner) -> Spelling:
        """Detect the spelling of the revision that ``run`` runs."""
        commands = set(re.findall(r"^  ([a-z]+) ", run("--help").stdout, re.MULTILINE))
        if "Commands:" in run("export", "--help").stdout:
            commands.add("export neighbours")
        if "--table" in run("inspect", "--help").stdout:
            commands.add("inspect --table")
        if "--changed" in run("chunk", "--help").stdout:
            commands.add("chunk --changed")
        return cls(frozenset(commands), "--sample" if "--sample" in run("index", "--help").stdout else "--queries")

    def undo(self, store: Path, purge: str) -> list[object]:
        if "undo" in self.commands:
            return ["undo", store, purge, "--reason", "pinned"]
        return ["purge", store, purge, "--restore", "--reason", "pinned"]

    def chunk_changed(self, store: Path, source: Path) -> list[object]:
        return ["chunk", store, source, *(["--changed", "add"] if "chunk --changed" in self.commands else [])]

    def listed(self, kind: str, file: Path) -> list[object]:
        """Select the chunks or documents ("chunk", "document") that are listed in a file."""
        if "erase" in self.commands:
            return [f"--{kind}", f"@{file}"]
        return [{"chunk": "--ids", "document": "--documents"}[kind], file]

    def erase(self, store: Path, *purges: str) -> list[object]:
        if "erase" in self.commands:
            return ["erase", store, *purges, "--yes"]
        return ["purge", store, *purges, "--erase", "--yes"]

    def export(self, store: Path, output: Path, table: str) -> list[object]:
        if "export neighbours" in self.commands:
            return ["export", "neighbours", store, output, "--format", "parquet", "--name", table]
        return ["export", store, output, self.table, table]

    @property
    def table(self) -> str:
        """Option of the commands that read a table."""
        return "--table" if "inspect --table" in self.commands else "--name"

    @property
    def asking(self) -> str:
        """Option of ``leakage`` for the store of the queries."""
        return "--queries" if "inspect --table" in self.commands else "--evaluation"


@dataclass(slots=True)
class Recording:
    """The results of a run: ``content`` of stores by step, ``exits`` and ``outputs`` by command."""

    content: dict[str, Any] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, list[str]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return everything as a flat mapping with names separated by ``/``."""
        return dict(_flat({"content": self.content, "exits": self.exits, "outputs": self.outputs}))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


class Session:
    """Runs commands on stores in ``folder`` and records the results."""

    def __init__(self, run: Runner, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder, self.recording = corpus, folder, Recording()
        self._run = run
        self.spelling = Spelling.of(run)

    def step(self, name: str, *arguments: object) -> str:
        done = self._run(*arguments)
        print(f"{name}: {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode not in (0, 3):
            print(done.stdout + done.stderr, file=sys.stderr, flush=True)
        self.recording.exits[name] = done.returncode
        self.recording.outputs[name] = self._plain(done.stdout) + self._plain(done.stderr)
        return done.stdout

    def _plain(self, text: str) -> list[str]:
        """Return lines without parts that differ between runs, and without progress bars."""
        text = text.replace(str(self.folder), "WORK").replace(str(self.corpus), "CORPUS")
        for pattern, stands_for in _VOLATILE:
            text = re.sub(pattern, stands_for, text)
        lines = [line.rpartition("\r")[2] for line in text.splitlines()]
        return [line if len(line) < 400 else _short(line) for line in lines if "%|" not in line and line.strip()]

    def read(self, name: str, store: Path) -> None:
        self.recording.content[name] = PlainStore(store).content()

    def verify(self, name: str, store: Path) -> None:
        found = json.loads(self.step(f"verify {name}", "verify", store, "--json"))
        self.recording.content.setdefault(name, {})["verify"] = _digests(found)

    def purge(self, name: str, store: Path, *selectors: object) -> str:
        """Purge, record the purged chunks, and return the purge's id, if any."""
        before = purges(store)
        self.step(f"purge {name}", "purge", store, *selectors, "--reason", "pinned", "--yes")
        tombstones = PlainStore(store).content()["tombstones"]
        self.recording.content[f"purged {name}"] = tombstones
        return next((purge for purge in purges(store) if purge not in before), "")

    def export(self, store: Path, output: Path, table: str) -> None:
        """Export neighbours as Parquet, and record a digest of each column in the order of chunks."""
        self.step("export", *self.spelling.export(store, output, table))
        files = sorted(output.glob("*.parquet"))
        if not files:
            return
        exported = pa.concat_tables(pq.read_table(path) for path in files).sort_by("chunk")
        columns: dict[str, Any] = {}
        for column in exported.column_names:
            digest = Digest()
            digest.values(exported[column].to_pylist())
            columns[column] = str(digest)
        self.recording.content["export"] = {"rows": exported.num_rows, "exported columns": columns}


_VOLATILE = (
    (r"\bp[0-9a-f]{8}\b", "PURGE"),
    (r"\b[0-9a-f]{64}\b", "HASH"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z?", "TIME"),
    (r"\b[0-9a-f]{16}([0-9a-f]{8})?\b", "TOKEN"),
    (r"\b[0-9a-f]{12}\b", "HASH"),
    (r"[\d.,]+ (s|ms|min|seconds|minutes|MB/s|kB/s|queries/s|queries a second|chunks/s)\b", r"N \1"),
    (r'"(rate|seconds|tokens_per_second|cosine|query_rate)":[\d.e-]+', r'"\1":N'),
    (r"[\d.]+ (MB|kB|GB)\b", r"N \1"),
    (r'"bytes":\d+', '"bytes":N'),
    (r"\S*/retrotool/", "retrotool/"),  # where the checkout is
    (r"(?m)^( +\d+ +\d+( +[01]\.\d{4}){3} +[\d,]+ +)[\d,]+$", r"\1N"),  # queries a second, in a curve
)


def _short(line: str) -> str:
    return f"{line[:300]}… {hashlib.sha256(line.encode()).hexdigest()[:16]}"


def _digests(found: dict[str, Any]) -> dict[str, Any]:
    flat = dict(_flat(found))
    return {name.rpartition("/")[2]: value for name, value in flat.items() if re.fullmatch("[0-9a-f]{64}", str(value))}


def purges(store: Path) -> list[str]:
    found: dict[str, None] = {}
    for commit in sorted((store / "log").glob("*.json")):
        records = json.loads(commit.read_bytes())["records"]
        found.update(dict.fromkeys(key.partition(":")[2] for key in records if key.startswith("purge:")))
    return list(found)


_FIRST_BATCHES = """
import hashlib, itertools, sys, retrotool
names = ("tokens", "loss_mask", "neighbours", "neighbour_mask", "chunk_ids", "neighbour_ids")
for shuffle in (False, True):
    data = retrotool.RetroDataset(sys.argv[1], sys.argv[2], 512, batch_size=4, shuffle=shuffle, seed=3)
    for batch in itertools.islice(data, 5):
        print(*(hashlib.sha256(batch[name].numpy().tobytes()).hexdigest()[:16] for name in names))
"""


def first_batches(store: Path, table: str) -> list[str]:
    """Return digests of the first batches of ``RetroDataset``, in order and shuffled."""
    command = [sys.executable, "-P", "-c", _FIRST_BATCHES, str(store), table]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() or done.stderr.splitlines()[-1:]


# What is done


QUESTIONS = ("how do I open a file for reading", "a branch is merged", "select rows from a table")
PART, SAVED = 65536, 10


def run_all(session: Session) -> Recording:
    store, queries = session.folder / "store", session.folder / "queries"
    build(session, store)
    ask(session, store, queries)
    grow(session, store)
    records(session)
    by_text(session)
    take_out(session, store, queries)
    session.step("plan", "plan", "--tokens", "20G", "--cores", 32, "--hosts", 4, "--memory-per-host", "256GB")
    return session.recording


def build(session: Session, store: Path, *, part: int = PART) -> None:
    """Make a store of all formats, with embeddings, an exact index and neighbours."""
    corpus, exact = session.corpus, session.corpus / "exact"
    chunk = ("chunk", store, corpus / "input", "--tokenizer", exact, "--keep", "year", "--part-size", part)
    session.step("chunk", *chunk)
    session.step("chunk again", *chunk)
    session.step("embed", "embed", store, "--encoder", exact)
    sample = (session.spelling.sample, 200)
    session.step("index exact", "index", store, "--name", "exact", "--nlist", 0, *sample)
    lists = ("--nlist", 128, "--code", "sq8", "--target-recall", 0.9, *sample, "--default")
    session.step("index lists", "index", store, "--name", "lists", *lists)
    session.step("neighbours", "neighbours", store, "--saved", SAVED)
    session.read("built", store)
    session.recording.outputs["rejected"] = [f"{n} {reason}" for reason, n in PlainStore(store).reasons().items()]
    session.verify("built", store)
    session.step("info", "info", store)


def ask(session: Session, store: Path, queries: Path) -> None:
    """Use another store's chunks as queries: neighbours, search, export, training."""
    corpus = session.corpus
    session.step("chunk queries", "chunk", queries, corpus / "evaluation.jsonl", "--tokenizer", corpus / "exact")
    session.step("embed queries", "embed", queries, "--encoder", corpus / "exact")
    for name, how in (("exact", ("--index", "exact")), ("all", ("--exact",))):
        options = ("--queries", queries, "--name", name, "-k", 5, "--saved", SAVED)
        session.step(f"neighbours {name}", "neighbours", store, *options, *how)
    filtered = ("--queries", queries, "--name", "far", "--index", "exact", "--saved", SAVED)
    session.step("neighbours far", "neighbours", store, *filtered, "--max-overlap", 0.5, "--exclude-near-copies")
    session.step("embed random", "embed", queries, "--encoder", corpus / "random", "--check")
    session.read("queries", queries)
    session.verify("queries", queries)
    for index in ("exact", "lists"):
        for question in QUESTIONS:
            found = session.step(f"search {index}: {question}", "search", store, question, "--index", index, "--json")
            results = [(one["id"], round(one["distance"], 5)) for one in json.loads(found).get("results", [])]
            session.recording.content.setdefault("search", {})[f"{index}: {question}"] = results
    session.step("leakage", "leakage", store, session.spelling.asking, queries, "--index", "exact")
    session.step("inspect", "inspect", queries, "--chunk", 3, session.spelling.table, "exact", "--json")
    session.export(queries, session.folder / "exported", "exact")
    batches = {"store": first_batches(store, "main"), "queries": first_batches(queries, "exact")}
    session.recording.content["first batches"] = batches


def grow(session: Session, store: Path) -> None:
    session.step("chunk more", "chunk", store, session.corpus / "extra.jsonl", "--keep", "year", "--part-size", PART)
    session.step("embed more", "embed", store, "--encoder", session.corpus / "exact")
    session.step("index exact more", "index", store, "--name", "exact")
    session.step("index lists more", "index", store, "--name", "lists")
    session.step("neighbours more", "neighbours", store)
    session.read("grown", store)
    session.verify("grown", store)


def records(session: Session) -> None:
    store, corpus = session.folder / "records", session.corpus
    fields = ("--key-field", "question", "--value-field", "answer")
    session.step("chunk records", "chunk", store, corpus / "pairs.jsonl", "--tokenizer", corpus / "exact", *fields)
    session.step("embed records", "embed", store, "--encoder", corpus / "exact")
    session.step("index records", "index", store)
    session.step("neighbours records", "neighbours", store, "--saved", SAVED)
    session.read("records", store)
    session.verify("records", store)


def by_text(session: Session) -> None:
    """Purge by text in a store with a lossless tokenizer."""
    store, corpus = session.folder / "bytes", session.corpus
    session.step("chunk bytes", "chunk", store, corpus / "bytes.jsonl", "--tokenizer", corpus / "bytes.json")
    session.step("embed bytes", "embed", store, "--encoder", corpus / "exact")
    session.read("bytes", store)
    session.verify("bytes", store)
    terms = session.folder / "terms.txt"
    terms.write_text("semaphore\nvirtual machine\n")
    session.purge("by pattern", store, "--pattern", r"(?i)segmentation\s+fault")
    session.purge("by terms", store, "--terms", terms)
    session.purge("by personal data", store, "--pii", "email,ip-address")
    session.purge("by nearness", store, "--like", QUESTIONS[0], "--within", 3)
    session.purge("by both", store, "--pattern", "(?i)deprecated", "--where", "source like 'p%'", "--and")
    session.read("bytes after purges", store)
    session.verify("bytes after purges", store)


def take_out(session: Session, store: Path, queries: Path) -> None:
    """Purge by every other selector, undo one, erase others, and rebuild what depends on them."""
    live = [int(i) for part in PlainStore(store).parts() for i in part.ids[100:4000:1300]]
    documents = sorted({name for part in PlainStore(store).parts() for name in part.documents[::20000]})
    ids, names = session.folder / "ids.txt", session.folder / "documents.txt"
    ids.write_text("".join(f"{i}\n" for i in live[2:]))
    names.write_text("".join(f"{name}\n" for name in documents[1:]))
    one = session.purge("by chunk", store, "--chunk", live[0], "--chunk", live[1])
    session.purge("by ids", store, *session.spelling.listed("chunk", ids))
    two = session.purge("by document", store, "--document", documents[0])
    session.purge("by documents", store, *session.spelling.listed("document", names))
    three = session.purge("by column", store, "--where", "source = 'fortunes' and year < 2000")
    session.purge("whole documents", store, "--chunk", live[0] + 5, "--whole-documents")
    session.purge("near duplicates", store, "--near-duplicates-of", ids)
    session.purge("contamination", store, "--contaminates", queries)
    session.purge("duplicates", store, "--duplicates")
    session.read("after purges", store)
    session.verify("after purges", store)
    session.step("search after purges", "search", store, QUESTIONS[0], "--index", "exact", "--json")
    session.step("dry run", "purge", store, "--where", "year = 2003", "--reason", "pinned", "--dry-run")
    session.step("undo", *session.spelling.undo(store, three))
    session.read("after an undo", store)
    session.verify("after an undo", store)
    session.step("erase", *session.spelling.erase(store, one, two))
    session.read("after an erase", store)
    session.verify("after an erase", store)
    session.step("chunk what was purged", *session.spelling.chunk_changed(store, session.corpus / "input"))
    for name in ("exact", "lists"):
        session.step(f"index {name} after an erase", "index", store, "--name", name)
    session.step("neighbours after an erase", "neighbours", store)
    session.read("rebuilt", store)
    session.verify("rebuilt", store)
    session.step("info at the end", "info", store)
    session.step("log", "log", store)


# Comparing


def differences(before: dict[str, Any], after: dict[str, Any], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the differences between two recordings: those that fail, and those that may be."""
    wrong: list[str] = []
    allowed: list[str] = []
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) == after.get(name):
            continue
        missing = name not in before or name not in after
        free = name.startswith((*FREE, *known)) or (missing and OPTIONAL.search(name))
        (allowed if free else wrong).append(f"{name}\n  - {before.get(name)}\n  + {after.get(name)}")
    return wrong, allowed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("corpus", type=Path)
    corpus.add_argument("inputs", nargs="+")
    corpus.add_argument("--megabytes", type=float, default=60)
    for name in ("record", "compare"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        command.add_argument("corpus", type=Path)
        command.add_argument("--revision", default="", help="what the recording calls the revision")
        command.add_argument("--work", type=Path, help="folder to make and to keep; else a temporary one")
        command.add_argument("--known", action="append", default=[], metavar="PREFIX")
    arguments = parser.parse_args()
    if arguments.command == "corpus":
        write_corpus(arguments.corpus, list(read_documents(arguments.inputs, arguments.megabytes)))
        print(corpus_digest(arguments.corpus))
        return
    digest = corpus_digest(arguments.corpus)
    if arguments.command == "compare" and json.loads(arguments.file.read_bytes())["corpus"] != digest:
        sys.exit(f"{arguments.corpus} is another corpus than that of {arguments.file}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recording = run_all(Session(run_retrotool, arguments.corpus.absolute(), folder.absolute()))
    found = {
        "revision": arguments.revision,
        "corpus": digest,
        "machine": describe(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **asdict(recording),
    }
    if arguments.command == "record":
        arguments.file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return
    wrong, allowed = differences(
        dict(_flat(json.loads(arguments.file.read_bytes()))),
        dict(_flat(json.loads(json.dumps(found)))),
        arguments.known,
    )
    print(*(f"may differ: {line}" for line in allowed), *(f"DIFFERS: {line}" for line in wrong), sep="\n")
    print(f"{len(wrong)} differences, {len(allowed)} that may be")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
