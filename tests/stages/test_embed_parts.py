"""``embed`` part by part: blocks, what is left zero, what goes wrong in one part, and what is recorded."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, make_encoder, make_rows, make_text, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from stored import copy_store, stored_file

import retrotool
from retrotool import api
from retrotool.embed import stage as embed_stage
from retrotool.embed import store_encoder
from retrotool.encoder import Encoder, Rows, cosines, find_encoder
from retrotool.encoder.devices import BATCH_TOKENS
from retrotool.errors import CorruptError, NotFiniteError, RetrotoolError, UsageError
from retrotool.store import log
from retrotool.store.parts import ROW_GROUP, read_chunks
from retrotool.store.storage import storage_at
from retrotool.store.store import Store
from retrotool.tokenizers import TokensDiffer


@pytest.fixture
def chunked(tmp_path: Path, corpus: Path, tiny_encoder: Path) -> Path:
    """A store of several parts without embeddings, whose tokenizer is the encoder's."""
    api.chunk(tmp_path / "store", [str(corpus)], tokenizer=str(tiny_encoder), part_size=100)
    return tmp_path / "store"


@pytest.fixture
def by_text(tmp_path: Path, corpus: Path, byte_level_tokenizer: Path) -> Path:
    """As ``chunked``, with another tokenizer."""
    api.chunk(tmp_path / "store", [str(corpus)], tokenizer=str(byte_level_tokenizer), part_size=100)
    return tmp_path / "store"


def sums(store: Path) -> dict[str, str]:
    state = Store.open(store).state
    return {slot: state.file("embeddings", slot, "tiny").sha256 for slot in state.group("embeddings", "tiny")}


@given(st.integers(0, 200_000), st.integers(1, 70_000))
def test_blocks_are_all_rows_in_order_and_lie_well_in_row_groups(rows: int, most: int) -> None:
    found = list(embed_stage.row_blocks(rows, most))
    assert [stop for _, stop in found[:-1]] == [start for start, _ in found[1:]]
    assert (found[0][0], found[-1][1]) == (0, rows) if rows else not found
    assert all(0 < stop - start <= most for start, stop in found)
    split = [1 for start, stop in found if stop - start >= ROW_GROUP and start % ROW_GROUP]
    assert len(split) <= 1, "no row group is read twice, but for one where small blocks become large ones"
    assert len(found) <= 2 * (rows // most) + rows // ROW_GROUP + 24, "none is small without a reason"


@pytest.mark.parametrize("straight", [True, False])
def test_blocks_of_any_size_give_each_chunk_its_own_vector(
    straight: bool, tiny_encoder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = request.getfixturevalue("chunked" if straight else "by_text")
    monkeypatch.setattr(embed_stage, "_BLOCK_ROWS", (24, 24))
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 300)
    result = api.embed(store, encoder=str(tiny_encoder))
    assert result.chunks == result.embedded == api.info(store).chunks
    assert result.parts == len(retrotool.open(store).parts()) > 2
    assert result.tokens > 40 * result.chunks, "real tokens and two special ones"
    encoder = Encoder(str(tiny_encoder), "cpu", forward="transformers")
    opened = Store.open(store)
    rows = embed_stage.EncoderRows(opened, encoder)
    assert rows.straight == straight
    for part in opened.state.parts():
        chunks = read_chunks(opened, part)
        true = encoder.embed(rows.rows(chunks.tokens, chunks.n_tokens))
        assert cosines(retrotool.open(store).embeddings(part), true).min() > 0.9999


def test_what_is_erased_has_no_vector_and_is_no_work(
    chunked: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_stage, "_BLOCK_ROWS", (16, 16))
    targets = retrotool.open(chunked).document("doc-9") + retrotool.open(chunked).document("doc-10")
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in targets))
    before = api.info(chunked).chunks
    api.purge(chunked, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=True)
    result = api.embed(chunked, encoder=str(tiny_encoder))
    assert result.chunks == before - len(targets)
    reader = retrotool.open(chunked)
    rows = np.array(targets) & 0xFFFFFFFF
    part = targets[0] >> 32
    matrix = reader.embeddings(part)
    assert not matrix[rows].any()
    assert matrix[np.setdiff1d(np.arange(len(matrix)), rows)].any(axis=1).all()
    assert api.verify(chunked).ok


def test_an_erase_that_commits_while_a_part_is_embedded_wins(
    chunked: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = retrotool.open(chunked).document("doc-9")
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in targets))
    write = embed_stage.EmbedWorker._write
    erased = 0

    def interrupted(self: embed_stage.EmbedWorker, part: int, *arguments: object) -> object:
        nonlocal erased
        entry = write(self, part, *arguments)  # type: ignore[arg-type]
        if part == targets[0] >> 32 and not erased:
            erased += 1
            assert np.load(self._store.storage.local(entry.path))[targets[0] & 0xFFFFFFFF].any()
            api.purge(chunked, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=True)
        return entry

    monkeypatch.setattr(embed_stage.EmbedWorker, "_write", interrupted)
    result = api.embed(chunked, encoder=str(tiny_encoder))
    assert erased == 1
    matrix = retrotool.open(chunked).embeddings(targets[0] >> 32)
    assert not matrix[np.array(targets) & 0xFFFFFFFF].any()
    assert result.embedded == api.info(chunked).chunks
    assert api.verify(chunked).ok


def test_a_part_that_was_erased_since_it_was_planned_is_not_embedded_in_vain(
    chunked: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = retrotool.open(chunked).document("doc-110")
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in targets))
    write = embed_stage.EmbedWorker._write
    begun: list[int] = []

    def noted(self: embed_stage.EmbedWorker, part: int, *arguments: object) -> object:
        if not begun:
            api.purge(chunked, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=True)
        begun.append(part)
        return write(self, part, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(embed_stage.EmbedWorker, "_write", noted)
    result = api.embed(chunked, encoder=str(tiny_encoder))
    assert targets[0] >> 32 > 0, "a later part than the first"
    assert sorted(begun) == Store.open(chunked).state.parts(), "each once"
    assert result.chunks == result.embedded == api.info(chunked).chunks
    assert result.parts == len(begun)


def test_a_corrupt_part_is_exit_12_and_the_others_are_embedded(chunked: Path, tiny_encoder: Path, cli: Cli) -> None:
    store = Store.open(chunked)
    broken = stored_file(chunked, store.state.part_file("chunks", 1).path)
    data = bytearray(broken.read_bytes())
    data[len(data) // 3] ^= 1
    broken.write_bytes(data)
    done = cli("embed", chunked, "--encoder", tiny_encoder)
    assert done.returncode == CorruptError.exit_code == 12
    assert broken.name in done.stderr
    assert "retrotool verify" in done.stderr
    assert set(sums(chunked)) == {f"{part:06d}" for part in store.state.parts() if part != 1}


def test_a_vector_that_is_no_number_names_the_chunk_and_its_document(
    chunked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    reader = retrotool.open(chunked)
    target = reader.chunk((1 << 32) + 5)
    path = Path(shutil.copytree(tiny_encoder, tmp_path / "models" / "tiny"))
    weights = load_file(path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][int(target.tokens[3])] = float("inf")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NotFiniteError, match=r"returned NaN or infinity for chunk \d+ \(row \d+ of part \d+, document 'doc-"
    ):
        api.embed(chunked, encoder=str(path))


def test_chunks_that_begin_and_end_inside_a_character(
    tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path
) -> None:
    store = tmp_path / "store"
    rows = [{"id": "emoji", "text": "🦖語" * 200}, {"id": "plain", "text": make_text(1, 50)}]
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(byte_level_tokenizer))
    reader = retrotool.open(store)
    texts = [reader.chunk(int(i)).text for i in reader.chunk_ids(0)]
    assert sum("�" in text for text in texts) > 5
    api.embed(store, encoder=str(tiny_encoder))
    encoder = Encoder(str(tiny_encoder), "cpu", forward="transformers")
    true = encoder.embed(encoder.tokenizer.encode_batch(texts))
    assert cosines(retrotool.open(store).embeddings(0), true).min() > 0.9999


def test_chunks_longer_than_the_model_are_cut(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    source = write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "text": make_text(i, 600)} for i in range(4)])
    api.chunk(store, [str(source)], tokenizer=str(tiny_encoder), chunk_length=512)
    api.embed(store, encoder=str(tiny_encoder))
    reader = retrotool.open(store)
    encoder = Encoder(str(tiny_encoder), "cpu", forward="transformers")
    rows = [reader.chunk(int(i)).tokens[:126].tolist() for i in reader.chunk_ids(0)]
    assert max(len(reader.chunk(int(i)).tokens) for i in reader.chunk_ids(0)) == 512
    assert cosines(reader.embeddings(0), encoder.embed(rows)).min() > 0.9999


def test_tokens_that_differ_are_thrown_away_with_their_part(
    by_text: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    from contextlib import redirect_stderr

    expected = by_text.parent / "expected"
    copy_store(by_text, expected)
    api.embed(expected, encoder=str(tiny_encoder))
    monkeypatch.setattr(embed_stage, "_BLOCK_ROWS", (24, 24))
    commands_before = Encoder.tokenize
    calls = 0

    def differs(self: Encoder, texts: list[str]) -> Rows:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise TokensDiffer("0.1", 3, "a text")
        return commands_before(self, texts)

    monkeypatch.setattr(Encoder, "tokenize", differs)
    said = io.StringIO()
    with redirect_stderr(said):
        result = api.embed(by_text, encoder=str(tiny_encoder))
    assert calls > 4
    assert "continuing with tokenizers" in said.getvalue()
    assert result.chunks == api.info(by_text).chunks
    for part in Store.open(by_text).state.parts():
        pair = [retrotool.open(store).embeddings(part) for store in (by_text, expected)]
        assert cosines(*pair).min() > 0.9999


def test_how_vectors_were_made_stands_in_the_commit(chunked: Path, tiny_encoder: Path) -> None:
    result = api.embed(chunked, encoder=str(tiny_encoder), dtype="bfloat16", devices="cpu")
    commit = log.read(storage_at(chunked), result.commit)
    settings = commit.settings
    assert {key: settings[key] for key in ("encoder", "device", "dtype", "forward", "why")} == {
        "encoder": "tiny", "device": "cpu", "dtype": "bfloat16", "forward": "packed", "why": "",
    }  # fmt: skip
    assert len(commit.add) == result.parts
    assert {entry.about["cosine"] for entry in commit.add} == {result.cosine}
    assert 0.99 < result.cosine <= 1
    assert (result.forward, result.dtype, result.device, result.devices) == ("packed", "bfloat16", "cpu", 1)


def test_several_encoders_lie_side_by_side_and_info_tells_what_each_covers(
    chunked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    other = make_encoder(tmp_path / "models" / "other", 3)
    api.embed(chunked, encoder=str(tiny_encoder))
    before = sums(chunked)
    result = api.embed(chunked, encoder=str(tiny_encoder), pooling="cls")
    assert (result.encoder, result.pooling) == ("tiny-cls", "cls")
    api.chunk(chunked, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(5, first=500)))])
    assert api.embed(chunked, encoder=str(other), name="mine").encoder == "mine"
    found = api.info(chunked)
    assert {name: (e["parts"], e["rows"]) for name, e in found.encoders.items()} == {
        "tiny": (len(before), result.embedded),
        "tiny-cls": (len(before), result.embedded),
        "mine": (len(found.parts), found.chunks),
    }
    assert sums(chunked) == before
    reader = retrotool.open(chunked)
    assert not np.allclose(reader.embeddings(0, "tiny"), reader.embeddings(0, "tiny-cls"), atol=0.01)
    api.index(chunked, name="cls", encoder="tiny-cls")
    left = api.index(chunked, name="cls")
    assert shlex.split(left.next[0])[3:] == ["--encoder", str(tiny_encoder), "--pooling", "cls"]
    assert retrotool.open(chunked).search("a token of the store", index="cls")
    api.embed(chunked, encoder=str(other), name="other", pooling="cls")
    api.index(chunked, name="named", encoder="other")
    more = make_rows(1, first=900)
    api.chunk(chunked, [str(write_jsonl(tmp_path / "last.jsonl", more))])
    command = shlex.split(api.index(chunked, name="named").next[0])
    assert command[3:] == ["--encoder", str(other), "--name", "other", "--pooling", "cls"]
    with pytest.raises(UsageError, match="another encoder under the name 'mine'") as error:
        api.embed(chunked, encoder=str(tiny_encoder), name="mine")
    assert "--name" in error.value.advice


def test_an_encoder_that_was_moved_is_known_by_its_weights_and_found_where_it_is(
    chunked: Path, tiny_encoder: Path, tmp_path: Path, cli: Cli
) -> None:
    first = Path(shutil.copytree(tiny_encoder, tmp_path / "models" / "first"))
    api.embed(chunked, encoder=str(first))
    api.index(chunked)
    moved = first.rename(tmp_path / "models" / "second")
    assert cli("search", chunked, "a token").returncode == 2, "it is no more where it was"
    result = api.embed(chunked, encoder=str(moved))
    assert (result.encoder, result.chunks) == ("first", 0), "nothing is embedded again"
    assert cli("search", chunked, "a token").returncode == 0
    assert api.info(chunked).encoders["first"]["origin"] == str(moved)
    number = Store.open(chunked).state.number
    shutil.copytree(moved, tmp_path / "models" / "third")
    api.embed(chunked, encoder=str(tmp_path / "models" / "third"))
    assert Store.open(chunked).state.number == number, "it is still where it was"
    assert api.embed(chunked, encoder=str(moved), name="again").chunks > 0, "a name that is asked for is another"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_tells_how_true_the_stored_vectors_are(
    dtype: str, chunked: Path, tiny_encoder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = api.embed(chunked, encoder=str(tiny_encoder), dtype=dtype, check=True)
    assert result.check is not None
    assert result.check["sample"] == result.embedded
    assert log.read(storage_at(chunked), result.commit).records == {"fidelity:tiny": result.check}
    store = Store.open(chunked)
    encoder = Encoder(str(tiny_encoder), "cpu", "float32", forward="transformers")
    sample = store_encoder.draw_sample(store, encoder)
    assert sample is not None
    assert len(set(sample.ids.tolist())) == len(sample.ids) == result.embedded
    true = encoder.embed(sample.rows)
    assert result.check["cosine_min"] == pytest.approx(cosines(sample.vectors, true).min(), abs=1e-6)
    reader = retrotool.open(chunked)
    for i in (0, 17, 200):
        chunk = reader.chunk(int(sample.ids[i]))
        assert sample.rows.take(np.array([i])).ids.tolist() == chunk.tokens.tolist()
        assert np.array_equal(sample.vectors[i], reader.embeddings(chunk.id >> 32)[chunk.id & 0xFFFFFFFF])
        same = sample.ids[sample.document == sample.document[i]]
        assert set(same.tolist()) == set(reader.document(chunk.document))
    assert f"recall@10 {result.check['recall_at_10']:.4f} against float32" in cli("info", chunked).stdout


def test_a_sample_is_drawn_from_all_parts_and_no_larger_than_asked(chunked: Path, tiny_encoder: Path) -> None:
    api.embed(chunked, encoder=str(tiny_encoder))
    encoder = Encoder(str(tiny_encoder), "cpu", forward="transformers")
    store = Store.open(chunked)
    sample, other = (store_encoder.draw_sample(store, encoder, 50, seed=seed) for seed in (0, 1))
    assert sample is not None
    assert other is not None
    assert len(sample.ids) == 50
    assert set((sample.ids >> 32).tolist()) == set(store.state.parts())
    assert not np.array_equal(sample.ids, other.ids)


def test_check_finds_vectors_of_another_model(chunked: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    liar = make_encoder(tmp_path / "models" / "liar", 9)
    api.embed(chunked, encoder=str(tiny_encoder))
    with pytest.MonkeyPatch.context() as patch:
        _, identity = find_encoder(str(tiny_encoder))
        patch.setattr(embed_stage, "Encoder", lambda spec, *a, **k: _posing(liar, identity, *a, **k))
        api.chunk(chunked, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(20, first=500)))])
        api.embed(chunked, encoder=str(tiny_encoder))
    with pytest.raises(RetrotoolError, match=r"stored vector of chunk \d+ differs from that of encoder tiny") as error:
        api.embed(chunked, encoder=str(tiny_encoder), check=True)
    assert "--name tiny-2" in error.value.advice


def _posing(path: Path, identity: object, *arguments: object, **options: object) -> Encoder:
    encoder = Encoder(str(path), "cpu")
    encoder.identity = identity  # type: ignore[assignment]
    encoder.cosine = 1.0
    encoder.verify = lambda *_: None  # type: ignore[method-assign]
    return encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling 'max' is unknown"),
        ({"name": "a/b"}, "can't be used as a name"),
        ({"devices": "cpu,"}, "is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(
    chunked: Path, tiny_encoder: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        api.embed(chunked, encoder=str(tiny_encoder), **options)  # type: ignore[arg-type]
    assert not sums(chunked)


def test_memory_does_not_grow_with_the_number_of_parts(tmp_path: Path, tiny_encoder: Path) -> None:
    """The most that a process has held after a few parts is the most that it holds after forty."""
    import json
    import subprocess
    import sys

    store = tmp_path / "store"
    source = write_jsonl(tmp_path / "c.jsonl", make_rows(700))
    result = api.chunk(store, [str(source)], tokenizer=str(tiny_encoder), part_size=40)
    assert result.parts >= 40
    code = (
        "import sys, json, resource\n"
        "from retrotool import api, engine\n"
        "from retrotool.embed.stage import EmbedWorker\n"
        "peaks, call = [], EmbedWorker.__call__\n"
        "def called(self, *a):\n"
        "    staged = call(self, *a)\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "    return staged\n"
        "EmbedWorker.__call__ = called\n"
        "api.embed(sys.argv[1], encoder=sys.argv[2], devices='cpu')\n"
        "print(json.dumps(peaks))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store), str(tiny_encoder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert len(peaks) == result.parts
    assert peaks[-1] - peaks[5] < 20 * 1024, f"{(peaks[-1] - peaks[5]) / 1024:.0f} MiB more after {len(peaks)} parts"
