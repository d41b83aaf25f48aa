"""A translation memory: for a sentence to translate, the most similar one that was translated before.

    python examples/translation_memory.py FOLDER MEMORY.tmx ... --to de --sentences NEW.txt

Translators' tools keep pairs of segments, a sentence and its translation, and offer the translation of a
similar sentence as a guide. A store of key-value records is such a memory, and is searched by meaning:

1. ``chunk --key-field original --value-field translation`` stores the pairs, and ``embed`` embeds the
   originals. The field ``source`` names the file of a pair, as each client has a memory.
2. For each line of NEW.txt, the nearest ten records are found. The one of them with the fewest words to edit
   is the match. Its score is the share of words that stay; from --threshold on, it is offered.
3. The memory that gave most matches is purged with ``--where "source = …"``, as when a client leaves, and the
   sentences are looked up again. Counts of matches are shown in the bands by which translators are paid.

TMX is the format in which all such tools export a memory; a gettext catalogue is converted by ``po2tmx`` of
the Translate Toolkit. The language after ``--to`` is that of the translations. A file in several has one run
for each. FOLDER must be new. ENCODER is as for ``retrotool embed``; use one of the originals' language.

Cost: embedding the originals, a minute for 15,000 sentences on two cores, and a search for each new one.
The key is an original's first 64 tokens, so the scores of longer ones are too low.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import retrotool
from retrotool import api
from retrotool.errors import RetrotoolError
from retrotool.reader import Reader
from retrotool.sources import Fields

CANDIDATES = 10  # nearest records, of which the most similar one is the match
BANDS = (100, 95, 85, 75, 50)
LANG = "{http://www.w3.org/XML/1998/namespace}lang"


@dataclass(frozen=True, slots=True)
class Match:
    """A record of the memory, and its ``score`` in percent for a sentence."""

    score: int
    original: str
    translation: str
    source: str


def read_tmx(path: Path, language: str) -> Iterator[tuple[str, str]]:
    """Yield the first segment in another language, and its translation, of each unit of a TMX file."""
    for unit in ElementTree.parse(path).iter("tu"):
        texts = {variant.get(LANG, "").lower(): variant.find("seg") for variant in unit.iter("tuv")}
        translated = {name: text for name, text in texts.items() if name.startswith(language.lower())}
        originals = [text for name, text in texts.items() if name not in translated]
        for original, text in zip(originals[:1], translated.values(), strict=False):
            if original is not None and text is not None:
                yield "".join(original.itertext()), "".join(text.itertext())


def read_memories(paths: list[Path], language: str) -> Iterator[dict[str, str]]:
    """Yield the pairs of all files as rows for ``chunk``, each original once per file."""
    for path in paths:
        for number, (original, translation) in enumerate(dict(read_tmx(path, language)).items()):
            row = {"id": f"{path.stem}/{number}", "source": path.stem}
            yield row | {"original": " ".join(original.split()), "translation": " ".join(translation.split())}


def words_to_edit(one: list[str], other: list[str]) -> int:
    """Return the least number of words to insert, delete or replace to make one list the other."""
    row = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, changed in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != changed))
    return row[-1]


def score(one: str, other: str) -> int:
    """Return the share of words that stay when one sentence is made the other, in percent."""
    words, others = one.split(), other.split()
    longest = max(len(words), len(others))
    return 100 * (longest - words_to_edit(words, others)) // longest


def best_matches(reader: Reader, sentences: list[str]) -> list[Match]:
    """Return, for each sentence, the record among the nearest with the fewest words to edit."""
    matches = list[Match]()
    for sentence, near in zip(sentences, reader.search_many(sentences, k=CANDIDATES), strict=True):
        if not near:  # everything is purged
            matches.append(Match(0, "", "", ""))
            continue
        best = max((neighbour.chunk for neighbour in near), key=lambda chunk: score(sentence, chunk.text))
        entry = reader.document_of(best.id)
        _, *value = reader.document(entry.id)
        translation = "".join(reader.chunk(chunk).text for chunk in value)
        matches.append(Match(score(sentence, best.text), best.text, translation, entry.source))
    return matches


def show_bands(matches: list[Match], when: str) -> None:
    """Print how many matches are in each band of scores, and below all."""
    counts = Counter(next((band for band in BANDS if match.score >= band), 0) for match in matches)
    print(f"{when:<19}" + "".join(f"{counts[band]:>7}" for band in (*BANDS, 0)))


def main(folder: Path, options: argparse.Namespace) -> None:
    sentences = [line for line in options.sentences.read_text("utf-8").splitlines() if line.strip()]
    rows = [row for row in read_memories(options.memories, options.to) if row["original"] and row["translation"]]
    if not rows:
        sys.exit(f"The memories have no translations to {options.to}.")
    folder.mkdir(parents=True)
    store, corpus = folder / "store", folder / "memory.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    api.chunk(store, [str(corpus)], fields=Fields(key="original", value="translation"), duplicates="keep")
    api.embed(store, encoder=options.encoder)
    api.index(store)
    reader = retrotool.open(store)

    before = best_matches(reader, sentences)
    fuzzy = [(text, match) for text, match in zip(sentences, before, strict=True) if match.score >= options.threshold]
    for sentence, match in fuzzy[:3]:
        print(f"{sentence}\n{match.score:>3} %  {match.original}\n    →  {match.translation}")
    print(f"{len(fuzzy)} of {len(sentences)} sentences match at {options.threshold} % or more.")
    if not fuzzy:
        return
    client, times = Counter(match.source for _, match in fuzzy).most_common(1)[0]
    where = "source = '" + client.replace("'", "''") + "'"
    api.purge(store, api.Selectors(where=where), reason="an example of a client who leaves")
    reader.refresh()
    after = best_matches(reader, sentences)
    left = sum(match.source == client for match in after)
    print(f"The memory {client} gave {times} of these; after its purge, it gives {left}.")
    print("best match         " + "".join(f"{f'{band} %':>7}" for band in BANDS) + "   less")
    show_bands(before, "before the purge")
    show_bands(after, "after")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("memories", type=Path, nargs="+")
    parser.add_argument("--to", required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--threshold", type=int, default=75, help="in percent")
    parser.add_argument("--encoder", default="minilm")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} is there already. Name a folder that is not.")
    try:
        main(arguments.folder, arguments)
    except RetrotoolError as error:
        sys.exit(f"error: {error}\n{error.advice}")
