"""What was found about ``tokie`` and a tokenizer, kept for the user's next store: to find it takes seconds.

A small file for each tokenizer, by the SHA-256 of its content, and for each set of library versions, in
``RETROTOOL_CACHE``, else in ``retrotool`` within ``XDG_CACHE_HOME`` or ``~/.cache``. All can be deleted at
any time. What can't be read is found again, and what can't be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import orjson

from retrotool.tokenizers.equivalence import Findings

VARIABLE = "RETROTOOL_CACHE"


def read_findings(content: bytes, versions: str) -> Findings | None:
    """Return the findings about a tokenizer, by the ``content`` of its file; None if there are none."""
    try:
        found = Findings.from_json(orjson.loads(_file(content, versions).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.versions == versions else None


def keep_findings(content: bytes, findings: Findings) -> None:
    """Keep findings about a tokenizer, in one step, as other processes may do the same."""
    path = _file(content, findings.versions)
    fields = {**asdict(findings), "runs": [[*run] for run in findings.runs]}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(orjson.dumps(fields))
        Path(file.name).replace(path)


def _file(content: bytes, versions: str) -> Path:
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrotool"
    about = hashlib.sha256(versions.encode()).hexdigest()[:16]
    return folder / "tokenizers" / f"{hashlib.sha256(content).hexdigest()[:32]}-{about}.json"
