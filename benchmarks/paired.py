"""Compare the times of two checkouts of retrotool, command by command, in alternating pairs.

    python benchmarks/paired.py A B --corpus CORPUS [--rounds 7] [--only chunk,embed] [--json FILE]

A and B are folders of checkouts; CORPUS is made by ``pin.py corpus``. Each checkout prepares its own store
once. A run is one command in a fresh process on a fresh copy of that store. A round runs each command with A
and with B, in alternating order. CPU seconds are user and system time of the process and its children; wall
seconds include starting.

The table has medians, the ratio of B's median to A's, and the quartiles of the ratios of pairs. A command
counts as slower if even the lower quartile is above 1.05. ``info`` and ``search`` are also compared with
their imports in the same round: ``python -c 'import typer, orjson'`` and ``python -c 'import torch, faiss,
pyarrow'``. The exit code is 1 if a command is slower by CPU seconds. Other load on the machine widens the
quartiles; then raise ``--rounds``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from machine import describe
from pin import QUESTIONS, Spelling, purges
from plain_store import PlainStore

SLOWER = 1.05
IMPORTS = {"info": "import typer, orjson", "search": "import torch, faiss, pyarrow"}
"""Imports that a command is also compared with."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a process with its children; ``cpu`` of all cores."""

    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout at ``path``; ``prepared`` is the folder of its stores."""

    path: Path
    prepared: Path

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-P", "-m", "retrotool", *map(str, arguments)]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment(), check=False)
        if done.returncode not in (0, 3):
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def environment(self) -> dict[str, str]:
        """Return an environment that imports only this checkout's retrotool."""
        return {**os.environ, "PYTHONPATH": str(self.path), "HF_HUB_OFFLINE": "1"}

    def time(self, command: Sequence[str]) -> Times:
        with tempfile.TemporaryFile() as output:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=output, stderr=output, env=self.environment())
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode not in (0, 3):
                output.seek(0)
                sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{output.read().decode()}")
        return Times(usage.ru_utime + usage.ru_stime, wall)


@dataclass(frozen=True, slots=True)
class Case:
    """A command to time on a copy of the store ``start`` ("": no store). ``arguments`` follow the store."""

    name: str
    start: str
    arguments: tuple[object, ...] = ()

    def command(self, checkout: Checkout, store: Path) -> list[str]:
        if self.name == "open":
            return [sys.executable, "-P", "-c", "import sys, retrotool; retrotool.open(sys.argv[1])", str(store)]
        return checkout.command(*self.words(Spelling.of(checkout.run), store))

    def words(self, spelling: Spelling, store: Path) -> list[object]:
        """Return the command and its arguments as a revision spells them."""
        if self.name == "erase":
            return spelling.erase(store, *purges(store))
        arguments = [*self.arguments]
        if self.name == "index":
            arguments += [spelling.sample, 200]
        elif self.name == "purge":
            arguments[:1] = spelling.listed("document", Path(str(arguments[0])))
        return [self.name, store, *arguments]


@dataclass(slots=True)
class Compared:
    """The runs of a command by both checkouts, in pairs, and runs of its imports."""

    name: str
    a: list[Times] = field(default_factory=list)
    b: list[Times] = field(default_factory=list)
    imports: list[Times] = field(default_factory=list)

    def ratios(self, what: str) -> tuple[float, float, float]:
        """Return B over A: of the medians, and the quartiles over pairs. ``what``: cpu or wall."""
        a, b = _seconds(self.a, what), _seconds(self.b, what)
        low, high = quartiles([y / x for x, y in zip(a, b, strict=True)])
        return statistics.median(b) / statistics.median(a), low, high

    def over_imports(self, runs: Sequence[Times]) -> float:
        """Return median CPU seconds relative to the imports."""
        return statistics.median(_seconds(runs, "cpu")) / statistics.median(_seconds(self.imports, "cpu"))

    def is_slower(self) -> bool:
        """Return whether B takes more CPU seconds than A, beyond the spread of pairs."""
        return self.ratios("cpu")[1] > SLOWER


def _seconds(runs: Sequence[Times], what: str) -> list[float]:
    return [run.cpu if what == "cpu" else run.wall for run in runs]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, method="inclusive")
    return low, high


def cases(corpus: Path, documents: Path) -> list[Case]:
    """Return the commands to time, in the order in which stores are prepared."""
    exact = corpus / "exact"
    lists = ("--nlist", 128, "--code", "sq8", "--target-recall", 0.9)
    return [
        Case("chunk", "", (corpus / "input", "--tokenizer", exact)),
        Case("embed", "chunk", ("--encoder", exact)),
        Case("index", "embed", lists),
        Case("neighbours", "index", ("--saved", 10)),
        Case("purge", "neighbours", (documents, "--reason", "timed", "--yes")),
        Case("erase", "purge"),
        Case("open", "neighbours"),
        Case("info", "neighbours"),
        Case("search", "small", (QUESTIONS[0],)),
    ]


def prepare(checkout: Checkout, corpus: Path, documents: Path) -> None:
    """Make the stores that cases start from, each a copy of the one before after one more command."""
    before = ""
    for case in cases(corpus, documents)[:5]:
        store = checkout.prepared / case.name
        if before:
            shutil.copytree(checkout.prepared / before, store)
        if case.name == "purge":
            names = sorted({name for part in PlainStore(store).parts() for name in part.documents[::2000]})
            documents.write_text("".join(f"{name}\n" for name in names))
        checkout.run(*case.words(Spelling.of(checkout.run), store))
        before = case.name
    small = checkout.prepared / "small"
    checkout.run("chunk", small, corpus / "evaluation.jsonl", "--tokenizer", corpus / "exact")
    checkout.run("embed", small, "--encoder", corpus / "exact")
    checkout.run("index", small)


def compare(case: Case, checkouts: tuple[Checkout, Checkout], rounds: int, folder: Path) -> Compared:
    found = Compared(case.name)
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            store = folder / "store"
            if case.start:
                shutil.copytree(checkouts[which].prepared / case.start, store)
            command = case.command(checkouts[which], store)
            (found.a, found.b)[which].append(checkouts[which].time(command))
            shutil.rmtree(store, ignore_errors=True)
        if case.name in IMPORTS:
            found.imports.append(checkouts[0].time([sys.executable, "-P", "-c", IMPORTS[case.name]]))
    return found


def table(found: Sequence[Compared]) -> str:
    columns = "".join(f" {f'A {what}':>8} {f'B {what}':>8} {'B/A':>6}  {'quartiles':<12}" for what in ("cpu", "wall"))
    lines = [f"{'':<11}{columns}"]
    for one in found:
        line = f"{one.name:<11}"
        for what in ("cpu", "wall"):
            a, b = (statistics.median(_seconds(runs, what)) for runs in (one.a, one.b))
            ratio, low, high = one.ratios(what)
            line += f" {a:8.3f} {b:8.3f} {ratio:6.3f}  {low:.3f}-{high:.3f} "
        if one.imports:
            seconds = statistics.median(_seconds(one.imports, "cpu"))
            a, b = one.over_imports(one.a), one.over_imports(one.b)
            line += f" A {a:.2f}, B {b:.2f} x {IMPORTS[one.name]} ({seconds:.3f})"
        lines.append(line + ("  SLOWER" if one.is_slower() else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", metavar="COMMAND,...")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    print(describe(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary), arguments.corpus.absolute()
        documents = folder / "documents.txt"
        checkouts = (Checkout(arguments.a.absolute(), folder / "a"), Checkout(arguments.b.absolute(), folder / "b"))
        for checkout in checkouts:
            prepare(checkout, corpus, documents)
        found = []
        for case in cases(corpus, documents):
            if not only or case.name in only:
                found.append(compare(case, checkouts, arguments.rounds, folder))
                print(f"{case.name} timed", file=sys.stderr, flush=True)
    print(table(found))
    if arguments.json:
        fields = {"machine": describe(), "rounds": arguments.rounds, "commands": [asdict(one) for one in found]}
        arguments.json.write_text(json.dumps(fields, indent=1) + "\n")
    sys.exit(1 if any(one.is_slower() for one in found) else 0)


if __name__ == "__main__":
    main()
