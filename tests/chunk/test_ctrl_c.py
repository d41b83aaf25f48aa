"""Ctrl-C while parts are written: the command ends, and the same one goes on."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, write_jsonl

from retrotool import api
from retrotool.chunk import part_writer


class Interrupted(ThreadPoolExecutor):
    """Its thread begins what it is given, and who gave it does not learn of it."""

    def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
        super().submit(*arguments, **named)
        raise KeyboardInterrupt


@pytest.mark.timeout(60)
def test_it_ends_the_thread_that_has_only_begun(
    tmp_path: Path, byte_level_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = write_jsonl(tmp_path / "in.jsonl", make_rows(20)), tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(part_writer, "ThreadPoolExecutor", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.chunk(store, [str(source)], tokenizer=str(byte_level_tokenizer))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("retrotool-write")]
    assert api.chunk(store, [str(source)]).documents == 20
    assert api.verify(store).ok
