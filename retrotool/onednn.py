"""Whether products of matrices can be computed by oneDNN, whose operators torch makes no promise to keep."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of ``dtype`` quickly, and rightly, on this CPU."""
    import torch

    try:
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return False
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return False
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 8, dtype=dtype), None)
        rows, bias = torch.ones(2, 8, dtype=dtype), torch.ones(16, dtype=dtype)
        return bool((torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "") == 9).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
