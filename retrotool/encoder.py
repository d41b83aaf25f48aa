"""The encoder: a frozen BERT that turns chunks into vectors.

Any model directory that ``transformers.AutoModel`` reads from safetensors. Rows are sorted by length and padded
only to the longest of their batch; pooling and normalising follow the model's own sentence-transformers
configuration, or are the mean over time of the RETRO paper (section 2.3) where there is none. Special tokens are
added, and pooled over, as sentence-transformers does; a text in which the tokenizer sees nothing is these tokens alone.
Cost on two CPU cores with MiniLM: about 120 chunks of 64 tokens a second.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson

from retrotool.errors import RetrotoolError, UsageError
from retrotool.store import atomic
from retrotool.store.paths import check_name
from retrotool.tokenizers import BUNDLED, Tokenizer, find_tokenizer, resolve_model

if TYPE_CHECKING:
    import torch

PATTERNS = ("*.json", "*.safetensors", "*/config.json")
_IDENTITY_FILES = (
    "config.json",
    "tokenizer.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """What a store keeps of an encoder; ``sha256`` covers weights, configuration and tokenizer."""

    name: str
    origin: str
    sha256: str
    tokenizer: str
    dimension: int
    pooling: str
    normalize: bool
    max_tokens: int

    def as_json(self) -> dict[str, Any]:
        """The record ``encoder:<name>``."""
        return asdict(self)


def find_encoder(spec: str) -> tuple[Path, EncoderIdentity]:
    """Describe the encoder that ``spec`` stands for, without loading it; ``UsageError`` says what is missing."""
    path = resolve_model(spec, "encoder", PATTERNS)
    if not (path / "config.json").is_file():
        raise UsageError(
            f"encoder {spec!r}: {path} has no config.json", "Name a model directory as transformers saves it."
        )
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UsageError(
            f"encoder {spec!r}: {path} has no safetensors weights; pickled ones can run code and are not loaded",
            "Convert it once, where you trust it: AutoModel.from_pretrained(...).save_pretrained(...)",
        )
    if not (path / "tokenizer.json").is_file():
        raise UsageError(
            f"encoder {spec!r}: {path} has no tokenizer.json",
            "Make it with: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    config = _json(path / "config.json")
    if "auto_map" in config:
        raise UsageError(
            f"encoder {spec!r} asks to run code of its own, which is never done",
            "Use a model that transformers knows itself.",
        )
    digest = hashlib.sha256()
    for file in (*(path / name for name in _IDENTITY_FILES), *weights):
        digest.update(f"{file.relative_to(path)} {atomic.file_sha256(file) if file.is_file() else '-'}\n".encode())
    pooling, normalize = _pooling(path)
    limit = _number(path / "config.json", config, "max_position_embeddings") or 512
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        padding = _number(path / "config.json", config, "pad_token_id")
        limit -= (1 if padding is None else padding) + 1  # these number positions from behind the padding index
    dimension = _number(path / "config.json", config, "hidden_size", "dim")
    if not dimension:
        raise UsageError(f"encoder {spec!r}: {path / 'config.json'} has no hidden_size", "It is no encoder.")
    more = path / "sentence_bert_config.json"
    declared = _number(more, _json(more), "max_seq_length")
    name = (
        spec if spec == BUNDLED else re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec).name if Path(spec).exists() else spec)
    )
    identity = EncoderIdentity(
        name=check_name(name.lstrip("-._") or "encoder", "encoder"),
        origin=spec if spec == BUNDLED or not Path(spec).exists() else str(Path(spec).absolute()),
        sha256=digest.hexdigest(),
        tokenizer=hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest(),
        dimension=dimension,
        pooling=pooling,
        normalize=normalize,
        max_tokens=min(limit, declared) if declared else limit,
    )
    return path, identity


def _load(path: Path) -> Any:
    """What a JSON file holds; None if there is no such file."""
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if there is no such file."""
    fields = _load(path)
    if not isinstance(fields, dict | None):
        raise UsageError(f"{path}: a {type(fields).__name__}, not a JSON object")
    return fields or {}


def _number(path: Path, fields: dict[str, Any], *names: str) -> int | None:
    """The first of some fields that is set; None if none is."""
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UsageError(f"{path}: {' or '.join(names)} is {value!r}, not a number")
    return value


def _pooling(path: Path) -> tuple[str, bool]:
    """Pooling ("mean" or "cls") and whether vectors are normalised, as the model's own configuration says."""
    config = _json(path / "1_Pooling" / "config.json")
    modules = _load(path / "modules.json") or []
    if not (isinstance(modules, list) and all(isinstance(module, dict) for module in modules)):
        raise UsageError(f"{path / 'modules.json'}: not a list of JSON objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise UsageError(
            f"encoder {path}: its module {unknown.pop()} is not supported", "Use a model without a projection."
        )
    mode = config.get("pooling_mode")
    on = {
        key.removeprefix("pooling_mode_") for key, value in config.items() if value is True and key != "include_prompt"
    }
    chosen = {str(mode)} if mode else on or {"mean_tokens"}
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(chosen) != 1 or not chosen <= set(names):
        raise UsageError(
            f"encoder {path}: pooling {', '.join(sorted(chosen))} is not supported", "Known are mean and cls."
        )
    return names[chosen.pop()], "Normalize" in kinds


def check_device(device: str, dtype: str = "auto") -> None:
    """``UsageError`` for a device or a type that an encoder can't be put on here; imports torch only if it has to."""
    if dtype not in ("auto", *_DTYPES):
        raise UsageError(f"dtype {dtype!r} is not known", f"Known are auto, {', '.join(_DTYPES)}.")
    if device in ("auto", "cpu"):
        return
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(f"device {device!r} is not known", "Use auto, cpu, cuda or cuda:N.")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: torch sees no GPU", "Use --device cpu, or install a CUDA build of torch.")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r}: torch sees {torch.cuda.device_count()} GPUs, numbered from 0")


class Encoder:
    """A loaded encoder on a device: token ids in, float16 vectors out."""

    def __init__(self, spec: str, device: str = "auto", dtype: str = "auto") -> None:
        import torch
        import transformers

        path, self.identity = find_encoder(spec)
        check_device(device, dtype)
        gpu = torch.cuda.is_available()
        self.device = ("cuda" if gpu else "cpu") if device == "auto" else device
        self.dtype = ("float16" if self.device.startswith("cuda") else "float32") if dtype == "auto" else dtype
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kind = getattr(torch, self.dtype)
        try:
            model = transformers.AutoModel.from_pretrained(
                path, dtype=kind, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
            self._model = model.to(self.device).eval()
        except Exception as error:  # the library raises whatever its parts do
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"encoder {spec!r} can't be loaded: {type(error).__name__}: {reason}") from error
        self.tokenizer = Tokenizer(find_tokenizer(str(path)))
        self._before, self._after = self.tokenizer.special_tokens()
        self._batch_tokens = _BATCH_TOKENS.get(self.device.split(":")[0], 4096)

    def embed(
        self, rows: Sequence[Sequence[int]], report: Callable[[int], object] = lambda _: None
    ) -> npt.NDArray[np.float16]:
        """Vectors, float16 [n, dimension], of rows of the encoder's own token ids, without special tokens.

        An empty row is embedded as the special tokens alone (zeros for a model without any); a row over the model's
        length is cut. ``report`` is told of each batch's rows. ``RetrotoolError`` names the row if the model gives NaN
        or a number that float16 can't hold.
        """
        import torch

        frame = len(self._before) + len(self._after)
        room = self.identity.max_tokens - frame
        lengths = np.array([min(len(row), room) for row in rows], np.int64)
        vectors = np.zeros((len(rows), self.identity.dimension), np.float16)
        # Longest first: a batch too large for the device shows at once.
        order = np.argsort(-lengths, kind="stable")
        whole = int((lengths + frame > 0).sum())
        report(len(rows) - whole)
        order = order[:whole]
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]]) + frame
            batch = order[start : start + max(1, self._batch_tokens // longest)]
            ids = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros((len(batch), longest), np.int64)
            for i, row in enumerate(batch):
                framed = [*self._before, *list(rows[row])[:room], *self._after]
                ids[i, : len(framed)] = framed
                mask[i, : len(framed)] = 1
            out = self._forward(torch.from_numpy(ids), torch.from_numpy(mask))
            with np.errstate(over="ignore"):
                vectors[batch] = out.cpu().numpy()
            finite = np.isfinite(vectors[batch]).all(axis=1)
            if not finite.all():
                raise RetrotoolError(
                    f"encoder {self.identity.name}: row {batch[np.argmin(finite)]} gives NaN or infinity",
                    "Try --dtype float32; if it stays, the model's weights are broken.",
                )
            start += len(batch)
            report(len(batch))
        return vectors

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pooled vectors, float32 [n, dimension], of padded ids [n, length]."""
        import torch

        with torch.inference_mode():
            ids, mask = ids.to(self.device), mask.to(self.device)
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            if self.identity.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weight = mask.unsqueeze(-1).float()
                pooled = (hidden * weight).sum(1) / weight.sum(1)
            result: torch.Tensor = torch.nn.functional.normalize(pooled) if self.identity.normalize else pooled
            return result
