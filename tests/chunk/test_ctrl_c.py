"""Ctrl-C while parts are written: the command ends, and the same one goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl

from retrotool import api


class Interrupted(threading.Thread):
    """It begins, and who started it does not learn of it."""

    def start(self) -> None:
        super().start()
        if self.name == "retrotool-ahead":
            raise KeyboardInterrupt


@pytest.mark.timeout(60)
def test_it_ends_the_thread_that_has_only_begun(
    tmp_path: Path, byte_level_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = write_jsonl(tmp_path / "in.jsonl", make_rows(20)), tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.chunk(store, [str(source)], tokenizer=str(byte_level_tokenizer))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("retrotool-ahead")]
    assert api.chunk(store, [str(source)]).documents == 20
    assert api.verify(store).ok
