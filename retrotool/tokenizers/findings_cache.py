"""What was found about ``tokie`` and a tokenizer, kept for the user's next store: to find it takes seconds.

Two small files for each tokenizer, by the SHA-256 of its content, and for each set of library versions, in
``cache_folder()``: the findings, and the states of code points that have occurred. All can be deleted at any
time. What can't be read is found again, and what can't be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import orjson

from retrotool.store.cache import cache_folder
from retrotool.tokenizers.equivalence import CODE_POINTS, Findings, States


def read_findings(content: bytes, versions: str) -> Findings | None:
    """Return the findings about a tokenizer, by the ``content`` of its file; None if there are none."""
    try:
        found = Findings.from_json(orjson.loads(_file(content, versions, "json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.versions == versions else None


def keep_findings(content: bytes, findings: Findings) -> None:
    """Keep findings about a tokenizer."""
    fields = {**asdict(findings), "runs": [[*run] for run in findings.runs]}
    _keep(_file(content, findings.versions, "json"), orjson.dumps(fields))


def read_states(content: bytes, versions: str) -> States | None:
    """Return the states of code points, uint8 [``CODE_POINTS``]; None if there are none."""
    try:
        found = zlib.decompress(_file(content, versions, "points").read_bytes())
    except (OSError, zlib.error):
        return None
    return np.frombuffer(found, np.uint8) if len(found) == CODE_POINTS else None


def keep_states(content: bytes, versions: str, states: States) -> None:
    """Keep the states of code points, with those that others have kept."""
    known = read_states(content, versions)
    merged = states if known is None else np.where(states, states, known)
    _keep(_file(content, versions, "points"), zlib.compress(merged.tobytes(), 1))


def _keep(path: Path, content: bytes) -> None:
    """Write a file in one step, as other processes may do the same."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)


def _file(content: bytes, versions: str, suffix: str) -> Path:
    about = hashlib.sha256(versions.encode()).hexdigest()[:16]
    return cache_folder() / "tokenizers" / f"{hashlib.sha256(content).hexdigest()[:32]}-{about}.{suffix}"
