"""``--memory`` holds, for an index and for neighbours: processes of their own, whose anonymous memory is watched.

Mapped files are not counted: the system takes their pages back when it needs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_encoder, write_jsonl

from retrotool import api
from retrotool.encoder import Encoder, Rows

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

D = 256
ASKED = 56_000_000
LARGE, SMALL = 160_000, 2000


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A store whose embeddings are larger than ``ASKED``, and one of which nothing is."""
    root = tmp_path_factory.mktemp("memory")
    encoder = make_encoder(root / "wide", 0, D)
    centres = np.random.default_rng(0).normal(size=(300, D)).astype(np.float32)
    rng = np.random.default_rng(1)

    def vectors(
        _: Encoder, blocks: Iterable[Rows], report: Callable[[int], object] = lambda _: None
    ) -> Iterator[np.ndarray]:
        for rows in blocks:
            report(len(rows))
            near = centres[rng.integers(0, len(centres), len(rows))]
            yield (near + rng.normal(size=(len(rows), D), scale=0.5)).astype(np.float16)

    made = {}
    for n in (LARGE, SMALL):
        made[n] = root / f"store-{n}"
        file = write_jsonl(root / f"{n}.jsonl", [{"id": f"{i}", "text": f"word{i}"} for i in range(n)])
        api.chunk(made[n], [str(file)], tokenizer=str(encoder), part_size=50_000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Encoder, "vectors", vectors)
            patch.setattr(Encoder, "verify", lambda encoder, _: setattr(encoder, "cosine", 1.0))
            api.embed(made[n], encoder=str(encoder))
    return made


def run(*arguments: object) -> tuple[dict[str, Any], int]:
    """What a command prints as JSON, and the most anonymous memory it was seen with, in bytes."""
    command = [sys.executable, "-m", "retrotool", *map(str, arguments), "--json"]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)])
            time.sleep(0.005)
        out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out), peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to see a process's memory in")
def test_memory_stays_under_what_was_asked_however_large_the_store(stores: dict[int, Path]) -> None:
    assert LARGE * D * 2 > 1.4 * ASKED, "the embeddings do not fit"
    asked = ("--memory", ASKED, "--sample", 500)
    _, program = run("index", stores[SMALL], *asked, "--nlist", 16)
    built, building = run("index", stores[LARGE], *asked)
    assert built["vectors"] == LARGE and built["nlist"] > 1 and built["target_met"]
    assert building - program <= ASKED
    again, evaluating = run("index", stores[LARGE], "--tune", "--sample", 2000)
    assert evaluating - program <= ASKED, "what it was trained in counts from then on"
    assert abs(again["recall_at_10"] - built["recall_at_10"]) <= built["recall_error"] + again["recall_error"]
    merged, merging = run("index", stores[LARGE], "--merge")
    assert merged["vectors"] == LARGE and merging - program <= ASKED
    # The tables of a part come on top: 50,000 rows of 20 neighbours are held twice for a moment.
    _, program = run("neighbours", stores[SMALL], "--memory", ASKED)
    found, finding = run("neighbours", stores[LARGE], "--memory", ASKED)
    assert found["queries"] == LARGE and finding - program <= ASKED + 2 * 50_000 * 20 * 12
