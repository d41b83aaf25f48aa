"""The encoder that a text is embedded with gives the vectors that the store has, without ``transformers`` if it can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import retrotool
from retrotool.embed.store_encoder import load_encoder
from retrotool.encoder.packed import PackedBert
from retrotool.errors import UsageError
from retrotool.store import folding
from retrotool.store.log import Draft
from retrotool.store.store import Store


@pytest.mark.parametrize(
    ("command", "printed"), [("search STORE forest", '"results":[{'), ("verify STORE", '"ok":true')]
)
def test_neither_transformers_nor_pandas_is_imported(built_store: Path, command: str, printed: str) -> None:
    arguments = [str(built_store) if word == "STORE" else word for word in command.split()]
    code = (
        "import sys; from retrotool.app import main\n"
        f"sys.argv = {['retrotool', *arguments, '--json']!r}\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = ('transformers', 'torch._dynamo', 'pandas', 'pyarrow.dataset')\n"
        "sys.exit(', '.join(name for name in heavy if sys.modules.get(name)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_no_text_is_embedded_by_an_encoder_that_is_not_here(store_copy: Path) -> None:
    store = Store.open(store_copy)
    name = store.state.names("embeddings")[0]
    record = {**store.state.records[f"encoder:{name}"], "origin": "their/model", "foreign": True}
    with folding.writing(store) as run:
        store.commit(run, lambda _: Draft("embed", records={f"encoder:{name}": record}))
    with pytest.raises(UsageError, match="were computed elsewhere, by their/model"):
        retrotool.open(store_copy).load_encoder()


def test_a_packed_forward_that_gives_other_vectors_than_those_stored_is_not_used(
    built_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(built_store)
    name = store.state.names("embeddings")[0]
    encoder = load_encoder(store, name)
    rows = encoder.tokenize(["a forest by the river"])
    assert encoder.forward == "packed"
    right = encoder.embed(rows)
    encoder.close()
    forward = PackedBert.forward

    def wrong(self, *arguments, **options):
        vectors = forward(self, *arguments, **options)
        vectors[:, 0] += 0.2 * vectors.norm(dim=1)
        return vectors

    monkeypatch.setattr(PackedBert, "forward", wrong)
    encoder = load_encoder(store, name)
    assert encoder.forward == "transformers"
    np.testing.assert_allclose(encoder.embed(rows), right, atol=2e-3)
