"""All five commands on text that every machine has: the documentation inside the installed Python.

    python examples/demo.py STORE

Writes the text beside the store as JSON lines, runs ``retrotool chunk``, ``embed``, ``index`` and ``neighbours`` on it,
shows what a few questions find and what lies near their answers, then purges and erases one document and shows that it
is gone. Takes a minute or two on two cores; the store stays, to play with.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTIONS = (
    "how do I open a file and read its lines?",
    "how can several threads wait for each other?",
    "what does the with statement do when an exception is raised?",
)
BUDGET_CHARACTERS = 1_100_000
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def documents() -> Iterator[dict[str, str]]:
    """The language reference (pydoc's topics), then the docstrings of the standard library, one document a module."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield {"id": f"topics/{name}", "text": text, "source": "topics"}
    library = Path(sysconfig.get_path("stdlib"))
    # The modules that people know come first: those that are in no package and not private.
    for path in sorted(library.rglob("*.py"), key=lambda path: (len(path.parts), path.name.startswith("_"), path)):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and (text := docstrings(path)):
            yield {"id": f"library/{relative.as_posix()}", "text": text, "source": "library"}


def docstrings(path: Path) -> str:
    """All docstrings of a module, without importing it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            name = "" if isinstance(node, ast.Module) else f"{node.name}: "
            found.append(name + text)
    return "\n\n".join(found)


def write_corpus(path: Path) -> None:
    """Write documents as JSON lines until the budget is spent."""
    left = BUDGET_CHARACTERS
    with path.open("w", encoding="utf-8") as file:
        for document in documents():
            left -= len(document["text"])
            if left < 0:
                break
            file.write(json.dumps(document) + "\n")


def retrotool(*arguments: object) -> None:
    """Run a command, showing it."""
    shown = " ".join(f'"{a}"' if " " in str(a) else str(a) for a in arguments)
    print(f"\n$ retrotool {shown}", flush=True)
    subprocess.run([sys.executable, "-m", "retrotool", *map(str, arguments)], check=True)


def answer(*arguments: object) -> Any:
    """The JSON object that a command prints."""
    command = [sys.executable, "-m", "retrotool", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def paragraph(text: str, indent: str) -> str:
    return textwrap.fill(textwrap.shorten(text, 300), 100, initial_indent=indent, subsequent_indent=indent)


def show_neighbours(store: Path, chunk: int) -> None:
    """Print a chunk and its two nearest neighbours with what follows them."""
    import retrotool as library

    reader = library.open(store)
    print(paragraph(f"chunk {chunk} of {reader.chunk(chunk).document}: {reader.chunk(chunk).text}", "  "))
    for neighbour in reader.neighbours(chunk):
        print(f"    neighbour at {neighbour.distance:.3f}, chunk {neighbour.id} of {neighbour.chunk.document}:")
        print(paragraph(neighbour.chunk.text, "      "))
        if neighbour.continuation is not None:
            print(paragraph("… " + neighbour.continuation.text, "      "))


def show_purge(store: Path, corpus: Path) -> None:
    """Purge and erase the document that answers the first question, and look for it again."""
    before = answer("search", store, QUESTIONS[0])["results"]
    victim = before[0]["document"]
    asked = next(result["id"] for result in before if result["document"] != victim)
    print(f"\nNow say that {victim} must be taken out.")
    takedown = corpus.with_name("takedown.txt")
    takedown.write_text(victim + "\n")
    retrotool("purge", store, "--documents", takedown, "--reason", "demo", "--erase", "--yes")

    after = answer("search", store, QUESTIONS[0])["results"]
    documents_before = [result["document"] for result in before]
    print(f'\n"{QUESTIONS[0]}" found, before: {", ".join(documents_before)}')
    print(f"{'after:':>{len(QUESTIONS[0]) + 17}} {', '.join(result['document'] for result in after)}")
    import retrotool as library

    reader = library.open(store)
    found = sum(
        n.chunk.document == victim
        for part in reader.parts()
        for i in reader.chunk_ids(part)
        for n in reader.neighbours(int(i))
    )
    print(f"Neighbours, computed before the purge, that are of {victim} when read now: {found}.")
    assert found == 0 and victim not in {result["document"] for result in after}
    print("\nA chunk that stays, with its neighbours:")
    show_neighbours(store, asked)


def main(argument: str) -> None:
    store = Path(argument)
    if store.exists():
        shutil.rmtree(store)
    corpus = store.with_name(store.name + "-corpus.jsonl")
    write_corpus(corpus)
    print(f"{corpus}: the documentation inside Python {sys.version.split()[0]}, {corpus.stat().st_size / 1e6:.1f} MB")
    retrotool("chunk", store, corpus)
    print("\nThe encoder, a BERT of six layers, now reads every chunk; on two cores this takes about a minute.")
    retrotool("embed", store)
    retrotool("index", store)
    retrotool("neighbours", store)
    for question in QUESTIONS:
        retrotool("search", store, question, "-k", 2)
    print("\nThe nearest neighbours of the chunk that answers the last question, from outside its own document:")
    show_neighbours(store, answer("search", store, QUESTIONS[-1], "-k", 1)["results"][0]["id"])
    show_purge(store, corpus)
    retrotool("verify", store)
    retrotool("info", store)
    print(
        f'\nThe store stays in {store}. Try: retrotool search {store} "your question"  (in .venv/bin after make demo)'
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
