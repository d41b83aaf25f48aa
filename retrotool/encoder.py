"""The encoder: a frozen BERT that turns chunks into vectors.

Any model directory that ``transformers.AutoModel`` reads from safetensors. Rows are sorted by length and padded
only to the longest of their batch; pooling and normalising follow the model's own sentence-transformers
configuration, or are the mean over time of the RETRO paper (section 2.3) where there is none. Special tokens are
added, and pooled over, as sentence-transformers does. Cost on two CPU cores with MiniLM: about 120 chunks of 64
tokens a second.
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
    limit = int(config.get("max_position_embeddings", 512))
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        limit -= int(config.get("pad_token_id", 1)) + 1  # these number positions from behind the padding index
    declared = _json(path / "sentence_bert_config.json").get("max_seq_length")
    name = (
        spec if spec == BUNDLED else re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec).name if Path(spec).exists() else spec)
    )
    identity = EncoderIdentity(
        name=check_name(name.lstrip("-._") or "encoder", "encoder"),
        origin=spec if spec == BUNDLED or not Path(spec).exists() else str(Path(spec).absolute()),
        sha256=digest.hexdigest(),
        tokenizer=hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest(),
        dimension=int(config.get("hidden_size") or config.get("dim") or 0),
        pooling=pooling,
        normalize=normalize,
        max_tokens=min(limit, int(declared)) if declared else limit,
    )
    return path, identity


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _pooling(path: Path) -> tuple[str, bool]:
    """Pooling ("mean" or "cls") and whether vectors are normalised, as the model's own configuration says."""
    config = _json(path / "1_Pooling" / "config.json")
    modules = orjson.loads((path / "modules.json").read_bytes()) if (path / "modules.json").is_file() else []
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


def choose_device(device: str) -> str:
    """``auto`` to ``cuda`` where there is one, else ``cpu``; ``UsageError`` for one that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: torch sees no GPU", "Use --device cpu, or install a CUDA build of torch.")
    try:
        return str(torch.device(device))
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is not known to torch", "Use auto, cpu or cuda.") from error


class Encoder:
    """A loaded encoder on a device: token ids in, float16 vectors out."""

    def __init__(self, spec: str, device: str = "auto", dtype: str = "auto") -> None:
        import torch
        import transformers

        path, self.identity = find_encoder(spec)
        self.device = choose_device(device)
        kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        self.dtype = ("float16" if self.device.startswith("cuda") else "float32") if dtype == "auto" else dtype
        if self.dtype not in kinds:
            raise UsageError(f"dtype {dtype!r} is not known", f"Known are auto, {', '.join(kinds)}.")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModel.from_pretrained(
                path, dtype=kinds[self.dtype], use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UsageError(f"encoder {spec!r} can't be loaded: {str(error).splitlines()[0]}") from error
        self._model = model.to(self.device).eval()
        self.tokenizer = Tokenizer(find_tokenizer(str(path)))
        self._before, self._after = self.tokenizer.special_tokens()
        self._batch_tokens = _BATCH_TOKENS.get(self.device.split(":")[0], 4096)

    def embed(
        self, rows: Sequence[Sequence[int]], report: Callable[[int], object] = lambda _: None
    ) -> npt.NDArray[np.float16]:
        """Vectors, float16 [n, dimension], of rows of the encoder's own token ids, without special tokens.

        An empty row gives zeros; a row over the model's length is cut. ``report`` is told of each batch's rows.
        ``RetrotoolError`` names the row if the model gives NaN or a number that float16 can't hold.
        """
        import torch

        room = self.identity.max_tokens - len(self._before) - len(self._after)
        lengths = np.array([min(len(row), room) for row in rows], np.int64)
        vectors = np.zeros((len(rows), self.identity.dimension), np.float16)
        # Longest first: a batch too large for the device shows at once.
        order = np.argsort(-lengths, kind="stable")
        order = order[: int((lengths > 0).sum())]
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]]) + len(self._before) + len(self._after)
            batch = order[start : start + max(1, self._batch_tokens // longest)]
            ids = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros((len(batch), longest), np.int64)
            for i, row in enumerate(batch):
                whole = [*self._before, *list(rows[row])[:room], *self._after]
                ids[i, : len(whole)] = whole
                mask[i, : len(whole)] = 1
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
