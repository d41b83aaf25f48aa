"""Memory that does not grow with the corpus: what is held of documents and of rows rejected."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
from conftest import write_jsonl
from stored import stored_file

import retrotool
from retrotool import api
from retrotool.chunk import quarantine
from retrotool.chunk import stage as chunk_stage
from retrotool.sources import Document, Fields, Rejected
from retrotool.store.paths import FileName
from retrotool.store.store import Store


def test_a_part_closes_when_what_is_kept_of_its_documents_grows_large(tmp_path, monkeypatch):
    """Whatever the number of chunks: kept columns are held in memory until then."""
    monkeypatch.setattr(chunk_stage, "COLUMN_BYTES", 200_000)
    monkeypatch.setattr(chunk_stage, "_BATCH_CHARACTERS", 50_000)
    rows = [{"id": str(i), "text": f"text {i}", "pad": "x" * 10_000} for i in range(100)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = api.chunk(tmp_path / "store", [str(path)], fields=Fields(keep=("pad",)))
    assert (result.documents, result.parts) == (100, 5)
    reader = retrotool.open(tmp_path / "store")
    assert [reader.chunk(reader.document(str(i))[0]).text for i in (0, 42, 99)] == ["text 0", "text 42", "text 99"]


def test_batches_count_all_that_is_held_of_a_document():
    def batches(**held):
        rows = (Document(str(i), "text", "s", i, i, **held) for i in range(30))
        return [len(documents) for documents, _, _ in chunk_stage._batches(rows)]

    large = "x" * (chunk_stage._BATCH_CHARACTERS // 10)
    assert batches() == [30]
    assert batches(kept=(large, None)) == batches(value=large) == [10, 10, 10]
    assert batches(tokens=np.zeros(len(large), np.uint16)) == [10, 10, 10]


def test_reasons_that_differ_in_numbers_only_are_held_once_they_are_many(monkeypatch, tmp_path):
    monkeypatch.setattr(quarantine, "REASONS", 3)
    bad = quarantine.Quarantine()
    bad.open("rows.jsonl")
    for i in range(10):
        bad.append(Rejected(i, f"not JSON: column {i:,}"))
    assert len(bad._reasons) == 4
    api.chunk(tmp_path / "store", [str(write_jsonl(tmp_path / "rows.jsonl", [{"text": "good"}]))])
    entry = bad.write(Store.open(tmp_path / "store"), FileName.new("0123abcd", "quarantine", "x", "parquet"))
    reasons = pq.read_table(stored_file(tmp_path / "store", entry.path))["reason"].to_pylist()
    assert reasons == [*(f"not JSON: column {i}" for i in range(3)), *["not JSON: column …"] * 7]


def test_reasons_that_differ_in_numbers_only_are_summed_up_as_one(tmp_path):
    lines = ['{"id": 1, "text": "good"}', *('{"id": %s' % ("1" * n) for n in range(1, 16)), "[]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    result = api.chunk(tmp_path / "store", [str(tmp_path / "rows.jsonl")])
    assert [(reason.rows, reason.reason) for reason in result.reasons] == [
        (15, "not JSON: unexpected end of data (column …)"),
        (1, "not a JSON object but an array"),
    ]
    assert result.reasons[0].line == 2
