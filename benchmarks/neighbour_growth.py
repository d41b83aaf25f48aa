"""Compare updating neighbours after a store has grown with a search of everything.

    python benchmarks/neighbour_growth.py FIRST... --then LATER... [--nlist N] [--encoder minilm] [--queries 2000]

Text of FIRST is chunked, embedded and indexed, and all its neighbours are found. Text of LATER is added, the
index is extended, and the table is updated; a second table is computed from scratch. Prints time and recall
of both.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from index import tool
from machine import describe
from neighbour_tables import look, table_of

WHOLE = "whole"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", nargs="+", type=Path)
    parser.add_argument("--then", nargs="+", type=Path, required=True)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--nlist", type=int, help="lists of the index; default: what index chooses")
    parser.add_argument("--queries", type=int, default=2000)
    arguments = parser.parse_args()
    print(describe())
    folder = Path(tempfile.mkdtemp())
    try:
        grow(arguments, folder)
    finally:
        shutil.rmtree(folder)


def grow(arguments: argparse.Namespace, folder: Path) -> None:
    store = folder / "store"
    took = 0.0
    for files in (arguments.first, arguments.then):
        run("chunk", store, *files, "--tokenizer", arguments.encoder)
        run("embed", store, "--encoder", arguments.encoder)
        run("index", store, *(("--nlist", arguments.nlist) if arguments.nlist else ()))
        took = run("neighbours", store)
    scratch = run("neighbours", store, "--name", WHOLE)
    print(f"brought up to date: {took:.1f} s; from scratch: {scratch:.1f} s")
    (_, one, _), (_, other, _) = (table_of(store, name) for name in ("main", WHOLE))
    print(f"the same ids at the same places: {100 * np.mean(one == other):.2f} %")
    for name in ("main", WHOLE):
        look(store, name, arguments.encoder, arguments.queries, folder)


def run(*command: object) -> float:
    start = time.perf_counter()
    subprocess.run([*tool(), *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
