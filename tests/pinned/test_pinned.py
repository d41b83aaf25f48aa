"""Ids, tokens, vectors and neighbours of a megabyte of text in every format stay as they are.

The text and the encoder are made by code, and the encoder's vectors are exact, so the digests in ``pinned.json`` hold
on every machine. After a change that is meant to alter them:
RETROTOOL_UPDATE_SNAPSHOTS=1 python -m pytest tests/pinned
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from exact_encoder import common_words, make_encoder
from pin import Document, differences, write_formats
from plain_store import Digest, PlainStore
from stored import folder_of

SNAPSHOT = Path(__file__).with_name("pinned.json")
SAVED = 5
WORDS = (
    "the of and to a in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also well did many before must through years where much your way down should because "
    "long each just state those people too mr how little good world make very year still see own work men day get here"
).split()


def make_documents(n: int) -> list[Document]:
    """Documents of 1 to 900 words, with capitals, punctuation, numbers, line breaks, accents and other scripts."""
    rng = random.Random(7)  # only its random() is promised to stay as it is
    documents = []
    for i in range(n):
        words = []
        for _ in range(1 + int(rng.random() ** 3 * 900)):
            word = WORDS[int(len(WORDS) * rng.random() ** 2)]
            drawn = rng.random()
            if drawn < 0.1:
                word = word.capitalize()
            elif drawn < 0.2:
                word += ".,;:!?\n\t"[int(8 * rng.random())]
            elif drawn < 0.23:
                word = str(int(rng.random() * 10000))
            elif drawn < 0.25:
                word = ("café", "naïve", "ﬁn", "日本", "Ωμέγα", "\u200b", "🙂", "unwordable" * 12)[
                    int(8 * rng.random())
                ]
            words.append(word)
        documents.append(Document(f"doc/{i}", " ".join(words), ("books", "web", "forum")[int(3 * rng.random())]))
    return documents


def nearest(store: PlainStore) -> tuple[np.ndarray, np.ndarray]:
    """Exact squared distances, float64 [n, saved + 1], and ids, of the nearest chunks outside each one's document."""
    parts = list(store.vectors("exact"))
    ids = np.concatenate([part.ids for part, _ in parts])
    vectors = np.concatenate([vectors for _, vectors in parts]).astype(np.float64)
    documents = np.unique([name for part, _ in parts for name in part.documents], return_inverse=True)[1]
    norms = (vectors**2).sum(1)
    found = []
    for row, vector in enumerate(vectors):
        distances = norms + norms[row] - 2 * (vectors @ vector)
        distances[documents == documents[row]] = np.inf
        order = np.lexsort((ids, distances))[: SAVED + 1]
        found.append((distances[order], ids[order]))
    return np.stack([one[0] for one in found]), np.stack([one[1] for one in found])


def check(found: dict[str, Any]) -> None:
    if os.environ.get("RETROTOOL_UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(SNAPSHOT.read_text())


def test_ids_tokens_vectors_and_neighbours_are_those_of_the_snapshot(cli, tmp_path: Path) -> None:
    documents = make_documents(700)
    write_formats(tmp_path / "input", documents)
    encoder = make_encoder(tmp_path / "exact", common_words((document.text for document in documents), 120))
    store = tmp_path / "store"
    chunked = cli("chunk", store, tmp_path / "input", "--tokenizer", encoder, "--keep", "year", "--part-size", 1000)
    assert chunked.returncode == 3, chunked.stderr
    for command in (
        ("embed", store, "--encoder", encoder),
        ("index", store, "--sample", 50),
        ("neighbours", store, "--saved", SAVED),
    ):
        done = cli(*command)
        assert done.returncode == 0, done.stderr
    plain = PlainStore(folder_of(store, tmp_path / "copy"))
    content = plain.content()
    # A distance in float32 differs by machine in its last bits, so neighbours are compared with exact ones.
    content["neighbours"] = pinned_neighbours(plain)
    assert content["counts"]["chunks"] > 3000
    assert len(plain.by_part("chunks")) > 2
    check(content)


def pinned_neighbours(store: PlainStore) -> dict[str, Any]:
    """Check all neighbours against exact ones; digest the ids of those rows whose distances are clearly apart."""
    rows = list(store.neighbours("main"))
    ids = np.concatenate([one[1] for one in rows])
    distances = np.concatenate([one[2] for one in rows])
    exact, nearest_ids = nearest(store)
    np.testing.assert_allclose(distances, exact[:, :SAVED], atol=1e-5)
    clear = (np.diff(exact, axis=1) > 1e-5).all(1)
    np.testing.assert_array_equal(ids[clear], nearest_ids[clear, :SAVED])
    digest = Digest()
    digest.array(ids[clear])
    return {"rows": len(ids), "clear": int(clear.sum()), "ids": str(digest)}


def test_comparing_names_what_differs_and_what_may() -> None:
    before = {"content/built/ids": "a", "content/built/tokens": "t", "exits/embed": 0, "outputs/embed": ["Done."]}
    columns = {"content/built/columns of documents/key": "k"}
    after = {**before, "content/built/ids": "b", "exits/embed": 1, "outputs/embed": ["Embedded."]}
    wrong, allowed = differences({**before, **columns}, after, known=["exits/"])
    assert [line.partition("\n")[0] for line in wrong] == ["content/built/ids"]
    assert [line.partition("\n")[0] for line in allowed] == [
        "exits/embed",
        "outputs/embed",
        "content/built/columns of documents/key",
    ]
    assert differences(before, before, known=[]) == ([], [])
