"""A GPU that is none: CPU tensors that say they are on ``cuda:0``, under CUDA's rules about devices.

``mock_cuda`` raises what CUDA raises: two devices in one operation (but for scalars and indices), ``numpy`` of what
is not on the host, a generator of the host for a tensor of the device. It counts in ``waits`` what makes the host
wait for the device, by operation. Streams and events do nothing. Rates and memory are not imitated.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
_READ = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "bincount", "unique", "argwhere",
    "masked_select", "equal", "repeat_interleave",
}  # fmt: skip
_SAME_DEVICE = {"index_select", "index_add_", "gather", "index_copy_", "addmm", "mm", "scatter_"}  # scalars too


class _OnDevice(torch.Tensor):
    def record_stream(self, stream: object) -> None:
        pass


def _is_there(value: object) -> bool:
    return isinstance(value, _OnDevice)


def _plain(value: Any) -> Any:
    if (
        isinstance(value, torch.Tensor)
        and type(value) is not torch.Tensor
        and not isinstance(value, torch.nn.Parameter)
    ):
        return value.as_subclass(torch.Tensor)
    return value


def _there(value: Any) -> Any:
    return value.as_subclass(_OnDevice) if isinstance(value, torch.Tensor) and not _is_there(value) else value


def _named(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"  # type: ignore[call-overload]


class _Rules(TorchFunctionMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__":
                return self._attribute(func, args)
            if name in ("to", "cuda", "cpu"):
                return self._move(func, name, args, kwargs)
            if name in ("numpy", "__array__"):
                if _is_there(args[0]):
                    raise TypeError("can't convert cuda:0 device type tensor to numpy")
                return func(*args, **kwargs)
            if name == "pin_memory":
                assert not _is_there(args[0]), "only memory of the host can be pinned"
                return args[0]
            if name == "record_stream":
                return None
            return self._call(func, name, args, kwargs)

    def _attribute(self, func: Any, args: Any) -> Any:
        asked, there = str(getattr(func, "__self__", "")), _is_there(args[0])
        if there and "'device'" in asked:
            return DEVICE
        if "'is_cuda'" in asked:
            return there
        return tree_map(_there if there else lambda found: found, func(_plain(args[0])))

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensor, there = args[0], _is_there(args[0])
        to, rest = {"cpu": torch.device("cpu"), "cuda": DEVICE}.get(name), []
        for given in args[1:]:
            if isinstance(given, str | torch.device):
                to = torch.device(given)
            elif isinstance(given, torch.Tensor):
                to = DEVICE if _is_there(given) else torch.device("cpu")
                rest.append(given.dtype)
            elif not (given is None or isinstance(given, bool)):  # non_blocking
                rest.append(given)
        if (named := kwargs.pop("device", None)) is not None:
            to = torch.device(named)
        non_blocking = kwargs.pop("non_blocking", False)
        plain = _plain(tensor)
        found = plain.to(*rest, **kwargs) if rest or kwargs else plain
        goes_there = there if to is None else to.type == "cuda"
        if goes_there != there:
            if there and not non_blocking:
                self._waits[f"to the host by {name}"] += 1
            found = found.clone()
        return _there(found) if goes_there else found

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        there = [value for value in flat if _is_there(value)]
        makes_there = _named(kwargs.get("device"))
        if makes_there:
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if not there and not makes_there:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if there:
            self._check(name, args, flat)
        if name == "copy_":
            func(_plain(args[0]), _plain(args[1]))
            return args[0]
        if name == "_addmm_activation":  # whose GELU is another on a CPU
            bias, x, weight = map(_plain, args)
            found = torch.nn.functional.gelu(torch.addmm(bias, x, weight), approximate="tanh")
        elif name == "mm" and "out_dtype" in kwargs:  # CUDA's alone
            found = _plain(args[0]).to(kwargs["out_dtype"]) @ _plain(args[1]).to(kwargs["out_dtype"])
        else:
            found = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if kwargs.get("out") is not None:
            return kwargs["out"]
        in_place = (name.endswith("_") and not name.startswith("__")) or name in ("__iadd__", "__isub__", "__imul__")
        if in_place and isinstance(found, torch.Tensor):
            return args[0]
        if isinstance(found, tuple) and type(found).__module__ == "torch.return_types":
            return type(found)([_there(one) for one in found])
        return tree_map(_there, found)

    def _check(self, name: str, args: Any, flat: list[torch.Tensor]) -> None:
        if name in _READ:
            self._waits[name] += 1
        if name in ("__getitem__", "__setitem__", "index_put_"):
            if not _is_there(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            indices = [one for one in tree_flatten(args[1])[0] if isinstance(one, torch.Tensor)]
            self._waits[f"{name} by a mask or by indices of the host"] += any(
                one.dtype == torch.bool or (one.ndim and not _is_there(one)) for one in indices
            )
            flat = [one for one in args[2:] if isinstance(one, torch.Tensor)]
        elif name == "copy_":
            return
        strangers = [one for one in flat if not _is_there(one) and (one.ndim or name in _SAME_DEVICE)]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found two devices, cuda:0 and cpu! ({name})"
            )


class _Nothing:
    """A stream or a device guard."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, *_: object) -> None:
        pass

    record = synchronize = wait_stream

    def record_event(self, *_: object) -> Any:
        return torch.cuda.Event()

    def elapsed_time(self, other: object) -> float:
        return 1.0


def _attend(query: Any, key: Any, value: Any, starts: Any, _: Any, longest: int, __: int) -> Any:
    """FlashAttention of rows that begin at ``starts``, with what it asks of its arguments."""
    assert starts.dtype == torch.int32 and query.dtype in (torch.float16, torch.bfloat16) and query.stride(-1) == 1
    bounds, found = _plain(starts).tolist(), torch.empty_like(query)
    for begin, end in pairwise(bounds):
        assert end - begin <= longest
        if end > begin:
            scores = torch.einsum("qhd,khd->hqk", query[begin:end].float(), key[begin:end].float())
            shares = (scores / query.shape[-1] ** 0.5).softmax(-1)
            found[begin:end] = torch.einsum("hqk,khd->qhd", shares, value[begin:end].float()).to(query.dtype)
    return found


@contextlib.contextmanager
def mock_cuda() -> Iterator[Counter[str]]:
    """Put one GPU into this process, for all threads that begin within; yield the count of waits."""
    import torch.nn.attention.varlen as varlen

    waits = Counter[str]()
    run, to = threading.Thread.run, torch.nn.Module.to

    def run_by_rules(self: threading.Thread) -> None:
        with _Rules(waits):
            run(self)

    def move(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if not any(_named(value) for value in (*args, *kwargs.values()) if isinstance(value, str | torch.device)):
            return to(self, *args, **kwargs)
        for module in self.modules():
            for held in (module._buffers, module._parameters):
                for key, tensor in held.items():
                    if tensor is not None:
                        held[key] = tensor.detach().as_subclass(_OnDevice)  # type: ignore[assignment]
        return self

    class Event(_Nothing):
        def synchronize(self, *_: object) -> None:
            waits["synchronize an event"] += 1

    cuda: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda *_: "mock",
        "current_device": lambda: 0, "get_device_capability": lambda *_: (9, 0), "empty_cache": lambda: None,
        "synchronize": lambda *_: None, "current_stream": lambda *_: _Nothing(), "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0, "mem_get_info": lambda *_: (1 << 30, 1 << 30),
        **dict.fromkeys(("Stream", "stream", "device"), _Nothing), "Event": Event,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(varlen, "varlen_attn", _attend))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", move))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_by_rules))
        stack.enter_context(_Rules(waits))
        yield waits
