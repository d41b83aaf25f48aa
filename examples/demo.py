"""All five commands on text that every machine has: the documentation inside the installed Python.

    python examples/demo.py FOLDER

1. Write the text to FOLDER as JSON lines, and make a store of it with ``chunk``, ``embed``, ``index`` and
   ``neighbours``.
2. Show what a few questions find, and the neighbours of their answers.
3. Purge and erase one document, and show that neither answers nor the bytes of files contain it.

Takes a few minutes on two cores. The store is kept. A second run begins again; it does not touch a folder
that it did not make.
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrotool.reader import Reader

QUESTIONS = (
    "how do I open a file and read its lines?",
    "how can several threads wait for each other?",
    "what does the with statement do when an exception is raised?",
)
BUDGET_CHARACTERS = 1_100_000
MARKER = ".made-by-the-demo"
INTERRUPTED = 130
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def documents() -> Iterator[dict[str, str]]:
    """Yield the language reference (pydoc's topics), then docstrings of the standard library."""
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


def run(*arguments: object) -> str:
    """Run a command and show its output, or return it if it is JSON; end the demo if it fails."""
    as_json = "--json" in arguments
    command = [sys.executable, "-m", "retrotool", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE if as_json else None, text=True) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reaches the command too, which says what it has kept
            raise
    if process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    return printed or ""


def retrotool(*arguments: object) -> None:
    """Run a command, showing it."""
    shown = " ".join(f'"{a}"' if " " in str(a) else str(a) for a in arguments)
    print(f"\n$ retrotool {shown}", flush=True)
    run(*arguments)


def answer(*arguments: object) -> Any:
    """Return the JSON object that a command prints."""
    return json.loads(run(*arguments, "--json"))


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


def traces(reader: Reader, chunk: int) -> dict[str, bytes]:
    """Return bytes by which a chunk is found in a file: its tokens, which are its text, and its vector."""
    tokens = reader.tokens([chunk])[0][: reader.chunk(chunk).n_tokens]
    part, row = chunk >> 32, chunk & 0xFFFFFFFF
    return {"text": tokens.tobytes(), "vector": reader.embeddings(part)[row].tobytes()}


def contents(file: Path) -> Iterator[bytes]:
    """Yield the bytes of a file; of Parquet, which is compressed, also those of its decoded columns."""
    import pyarrow.parquet as pq

    yield file.read_bytes()
    if file.suffix == ".parquet":
        for column in pq.read_table(file).columns:
            for piece in column.chunks:
                yield from (buffer.to_pybytes() for buffer in piece.buffers() if buffer is not None)


def show_bytes(store: Path, wanted: dict[str, bytes], when: str) -> int:
    """Look for bytes in every file of a store; print and return in how many files any of them is."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    found = dict.fromkeys(wanted, 0)
    for file in files:
        inside = list(contents(file))
        for what, data in wanted.items():
            found[what] += any(data in piece for piece in inside)
    line = ", ".join(f"its {what} in {n}" for what, n in found.items())
    print(f"  {when:<15} {line} of {len(files)} files")
    return sum(found.values())


def show_purge(store: Path, takedown: Path) -> None:
    """Purge and erase the document that answers the first question, and look for it again."""
    import retrotool as library

    before = answer("search", store, QUESTIONS[0])["results"]
    purged, chunk = before[0]["document"], before[0]["id"]
    asked = next(result["id"] for result in before if result["document"] != purged)
    print(f"\nNow say that {purged} must be removed.")
    print(f"Looking for the bytes of its chunk {chunk} in every file of {store}, Parquet decoded:")
    wanted = traces(library.open(store), chunk)
    assert show_bytes(store, wanted, "before:")
    takedown.write_text(purged + "\n")
    retrotool("purge", store, "--document", f"@{takedown}", "--reason", "demo", "--erase", "--yes")

    after = answer("search", store, QUESTIONS[0])["results"]
    documents_before = [result["document"] for result in before]
    print(f'\n"{QUESTIONS[0]}" found, before: {", ".join(documents_before)}')
    print(f"{'after:':>{len(QUESTIONS[0]) + 17}} {', '.join(result['document'] for result in after)}")
    reader = library.open(store)
    found = sum(
        n.chunk.document == purged
        for part in reader.parts()
        for i in reader.chunk_ids(part)
        for n in reader.neighbours(int(i))
    )
    print(f"Neighbours, computed before the purge, that are of {purged} when read now: {found}.")
    assert found == 0 and purged not in {result["document"] for result in after}
    print(f"The bytes of chunk {chunk} in the files of {store}, looked for as before:")
    assert not show_bytes(store, wanted, "after the erase:")
    print("\nAnd all of it, in every file that can hold it and by every read path, with a receipt to send back:")
    purge = list(answer("info", store)["purges"])[-1]
    retrotool("receipt", store, purge, "--out", store.parent)
    print("\nA chunk that stays, with its neighbours:")
    show_neighbours(store, asked)


def make_folder(folder: Path) -> None:
    """Return an empty folder to work in; remove only what an earlier demo made."""
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"{folder} is there, and this demo did not make it. Name a folder that is not there.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    if (folder / "store").exists():
        shutil.rmtree(folder / "store")


def to_paste(*arguments: str) -> str:
    """Return a command line for the retrotool that belongs to this Python."""
    program = Path(sys.executable).with_name("retrotool")
    if not program.is_file():
        return shlex.join([sys.executable, "-m", "retrotool", *arguments])
    here = Path.cwd()
    return shlex.join([str(program.relative_to(here) if program.is_relative_to(here) else program), *arguments])


def main(folder: Path) -> None:
    make_folder(folder)
    store, corpus = folder / "store", folder / "corpus.jsonl"
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
    show_purge(store, folder / "takedown.txt")
    retrotool("verify", store)
    retrotool("info", store)
    print(f"\nThe store stays in {store}. Ask it something:\n")
    print(to_paste("search", str(store), "how do I sort a list?"))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        print("The demo was interrupted. Run it again: it begins again.", file=sys.stderr)
        sys.exit(INTERRUPTED)
