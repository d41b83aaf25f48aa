"""Run ``embed``: embed all parts without embeddings of an encoder, and check stored vectors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrotool import engine
from retrotool.cli.command_lines import command_line
from retrotool.embed.foreign_vectors import check_vectors, find_vectors, foreign_identity, parts_given
from retrotool.embed.search_scope import count_keys_of, embedded_parts
from retrotool.embed.stage import EmbedStage
from retrotool.embed.store_encoder import compare, draw_sample
from retrotool.encoder import Encoder, EncoderIdentity, default_name, find_encoder
from retrotool.encoder.devices import pick_device
from retrotool.engine.progress import Progress, counting
from retrotool.errors import RetrotoolError, UsageError
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.staging import Staged
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.tokenizers import BUNDLED

_OTHER_MODEL = 0.99  # below this cosine, a stored vector comes from another model or is broken


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """The result of ``embed``, see ``docs/json.md``; chunks are keys."""

    encoder: str
    dimension: int
    pooling: str
    chunks: int
    embedded: int
    commit: int
    parts: int = 0
    in_other_runs: int = 0
    tokens: int = 0  # the encoder's, with special ones
    seconds: float = 0.0
    busy: float = 0.0  # share of the devices' time spent in the forward
    device: str = ""
    devices: int = 0
    dtype: str = ""
    forward: str = ""
    why: str = ""  # reason for using ``transformers``
    gelu: str = ""  # "tanh": in place of the model's exact GELU
    cosine: float | None = None  # the least with ``transformers`` in float32
    foreign: bool = False  # vectors made elsewhere
    check: dict[str, Any] | None = None  # the record of ``--check``


class _Done:
    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self.how: dict[str, Any] = {}  # how vectors were computed, by the least accurate worker
        self.sums = {"tokens": 0.0, "forward": 0.0, "working": 0.0}
        self.first = self.last = 0.0  # start of the first part, end of the last

    def __call__(self, staged: Staged) -> bool:
        self.last = time.monotonic()
        self.first = min(self.first or self.last, self.last - staged.measured["working"])
        self.sums = {name: total + staged.measured[name] for name, total in self.sums.items()}
        for entry in staged.add:
            self.parts[entry.path] = entry.part
            how = {**staged.settings, **(entry.about or {})}
            self.how = min(self.how or how, how, key=lambda one: float(one.get("cosine", 1)))
        return False


def embed(
    root: str | Path,
    *,
    encoder: str = BUNDLED,
    name: str | None = None,
    pooling: str = "auto",
    dimension: int | None = None,
    devices: str = "auto",
    dtype: str = "auto",
    check: bool = False,
    vectors: str | Path | None = None,
    wait: bool = True,
    more: Callable[[], bool] | None = None,
) -> EmbedResult:
    """Embed every part that has no embeddings of ``encoder``, on one or several devices.

    With several devices processes are spawned, so a script must call this below
    ``if __name__ == "__main__":``. ``vectors``: files of vectors made elsewhere, by a model ``encoder``.
    ``wait``: for parts that other runs embed. ``more``: whether there may be more parts soon; wait for them.
    """
    store = Store.open(root)
    if vectors is not None:
        if encoder == BUNDLED:
            raise UsageError("--from needs the name of the model that made the vectors", "Give it as --encoder NAME.")
        if check or dimension or (pooling, dtype) != ("auto", "auto"):
            advice = "Give only the name of the model that made them as --encoder."
            raise UsageError("--from takes vectors as they are: no --check, --pooling, --dimension or --dtype", advice)
        found, files = ["cpu"], find_vectors(str(vectors))
        identity = foreign_identity(encoder, name or default_name(encoder), files.dimension)
    else:
        found, files = engine.worker_devices(devices, dtype), None
        with Progress("embed", doing="reading the encoder"):
            identity = find_encoder(encoder, pooling=pooling, name=name, dimension=dimension)[1]
    if name is None:  # use the store's name for it, even if it was moved
        known = store.state.with_prefix("encoder:")
        names = sorted(name for name, record in known.items() if record["sha256"] == identity.sha256)
        identity = identity if not names or identity.name in names else replace(identity, name=names[0])
    given = () if files is None else parts_given(store, files, identity.name)
    stage = EmbedStage(encoder, identity, tuple(found), dtype, files, given)
    done = _Done()
    with writing(store) as run:
        _update_origin(store, run, identity)
        if files is not None:
            retry_overtaken(lambda: check_vectors(store, stage), store.renew)
        elsewhere = engine.execute(stage, store, run, workers=len(found), enough=done, wait=wait, more=more)
        checked = _check(store, run, encoder, identity, pick_device(found[0])) if check else None
    state = store.refresh()
    made = [part for path, part in done.parts.items() if state.has(path)]
    return EmbedResult(
        encoder=identity.name, dimension=identity.dimension, pooling=identity.pooling, foreign=identity.foreign,
        chunks=count_keys_of(store, made), embedded=count_keys_of(store, embedded_parts(store, identity.name)),
        commit=state.number, parts=len(made), in_other_runs=elsewhere, tokens=int(done.sums["tokens"]),
        seconds=round(done.last - done.first, 3),
        busy=round(done.sums["forward"] / done.sums["working"], 4) if done.parts else 0.0,
        devices=min(len(found), len(made)), check=checked,
        **{key: done.how[key] for key in ("device", "dtype", "forward", "why", "gelu", "cosine") if key in done.how},
    )  # fmt: skip


def _update_origin(store: Store, run: Run, identity: EncoderIdentity) -> None:
    """Record an encoder's new location if it was moved, since ``search`` loads it from there."""
    key = f"encoder:{identity.name}"

    def build(state: State) -> Draft | None:
        record = state.records.get(key)
        if record is None or record["sha256"] != identity.sha256 or record["origin"] == identity.origin:
            return None
        if not Path(record["origin"]).is_absolute() or Path(record["origin"]).exists():
            return None
        return Draft("embed", {"encoder": identity.name}, records={key: {**record, "origin": identity.origin}})

    store.commit(run, build)


def _check(store: Store, run: Run, spec: str, identity: EncoderIdentity, device: str) -> dict[str, Any] | None:
    """Compare stored vectors with ``transformers`` and commit the result; raise if one is another model's."""
    reference = Encoder(spec, device, "float32", forward="transformers", **identity.settings)
    store.refresh()
    sample = retry_overtaken(lambda: draw_sample(store, reference), store.renew)
    if sample is None:
        return None
    with counting("check", "chunk", len(sample.ids)) as report:
        cosine, recall = compare(sample.vectors, reference.embed(sample.rows, report), sample.document)
    reference.close()
    worst, least = int(sample.ids[cosine.argmin()]), float(cosine.min())
    record = {
        "sample": len(cosine),
        "cosine_min": round(least, 6),
        "cosine_mean": round(float(cosine.mean()), 6),
        "recall_at_10": round(recall, 4),
        "worst_chunk": worst,
        "against": f"transformers, float32, on {reference.device_name}",
    }
    settings = {"encoder": identity.name, "check": True}
    store.commit(run, lambda _: Draft("embed", settings, records={f"fidelity:{identity.name}": record}))
    if least < _OTHER_MODEL:
        pooling = identity.pooling if identity.overridden else None
        given = None if spec == BUNDLED else spec
        name, dimension = f"{identity.name}-2", identity.dimension if identity.truncated else None
        again = command_line("embed", store.place, encoder=given, name=name, pooling=pooling, dimension=dimension)
        raise RetrotoolError(
            f"the stored vector of chunk {worst} differs from that of encoder {identity.name}: "
            f"their cosine is {least:.4f}",
            f"If {command_line('verify', store.place)} finds nothing, embed again under another name: {again}",
        )
    return record
