"""``doctor`` warns of what makes commands slow or stop, and says what to do; what it looks at is faked here."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Cli
from stored import contents_of

from retrotool import machine
from retrotool.errors import StorageError
from retrotool.info import doctor

SOUND = {
    "version_of": lambda _: "1.0",
    "loaded_kernels": lambda: {"numpy": "Haswell", "faiss_cpu": "SkylakeX"},
    "free_in": lambda _: 1 << 40,
    "durable_write": lambda _: (3.0, 0.1),
}
MACHINE = {"cores": lambda: 4, "cpu_quota": lambda: None, "memory_of_machine": lambda: 64 << 30,
           "has_onednn": lambda _: True}  # fmt: skip


def devices(names: list[str], *, bfloat16: bool = True, cpu: str = "AVX2") -> SimpleNamespace:
    cuda = SimpleNamespace(
        device_count=lambda: len(names), get_device_name=names.__getitem__, is_bf16_supported=lambda: bfloat16
    )
    backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: cpu))
    return SimpleNamespace(cuda=cuda, backends=backends, bfloat16="bfloat16")


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without a fault."""
    for name, value in SOUND.items():
        monkeypatch.setattr(doctor, name, value)
    for name, value in MACHINE.items():
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(doctor, "torch", devices(["H100"]))
    return monkeypatch


def faults(store: Path | None = None) -> dict[str, tuple[str, str, str]]:
    found = doctor.doctor(store)
    assert found.ok == all(check.status != "fail" for check in found.checks)
    wrong = [check for check in found.checks if check.status != "ok"]
    assert all(not check.advice for check in found.checks if check not in wrong)
    return {check.name: (check.status, check.found, check.advice) for check in wrong}


Fake = Callable[[pytest.MonkeyPatch], object]
FAULTS: dict[str, tuple[Fake, str, str, str]] = {
    "a package": (
        lambda m: m.setattr(doctor, "version_of", lambda name: "" if name == "faiss-cpu" else "1.0"),
        "packages", "fail", "pip install faiss-cpu",
    ),
    "an extra": (
        lambda m: m.setattr(doctor, "version_of", lambda name: "" if name == "fastwarc" else "1.0"),
        "extra warc", "info", "pip install fastwarc",
    ),
    "an old kernel": (
        lambda m: m.setattr(doctor, "loaded_kernels", lambda: {"numpy": "Haswell", "faiss_cpu": "Prescott"}),
        "OpenBLAS", "warn", "OPENBLAS_CORETYPE=Haswell",
    ),
    "a quota": (lambda m: m.setattr(machine, "cpu_quota", lambda: 1.5), "cores", "warn", "OMP_NUM_THREADS=1 "),
    "little memory": (
        lambda m: m.setattr(machine, "memory_of_machine", lambda: 1 << 30), "memory", "warn", "--memory",
    ),
    "little shared memory": (
        lambda m: m.setattr(doctor, "free_in", lambda folder: 64 << 20 if folder == doctor.SHARED else 1 << 40),
        doctor.SHARED, "warn", "--shm-size",
    ),
    "a full scratch folder": (
        lambda m: m.setattr(doctor, "free_in", {"/dev/shm": 1 << 40, doctor.scratch_folder(): 1 << 20}.get),
        "scratch", "warn", "--scratch",
    ),
    "no scratch folder": (lambda m: m.setenv("RETROTOOL_SCRATCH", "/nowhere"), "scratch", "fail", "--scratch"),
    "a full disk": (
        lambda m: m.setattr(doctor, "free_in", lambda folder: 1 << 20 if folder.endswith("store") else 1 << 40),
        "disk", "warn", "space",
    ),
    "slow writes": (
        lambda m: m.setattr(doctor, "durable_write", lambda _: (250.0, 0.0)), "durable write", "warn", "local disk",
    ),
    "a clock": (lambda m: m.setattr(doctor, "durable_write", lambda _: (3.0, -400.0)), "clock", "warn", "NTP"),
    "a store that can't be written": (
        lambda m: m.setattr(doctor, "durable_write", raising(StorageError("read-only", "Check the permissions."))),
        "store", "fail", "Check the permissions.",
    ),
    "few open files": (
        lambda m: m.setattr(resource, "getrlimit", lambda _: (200, 200)), "open files", "warn", "ulimit -n 2",
    ),
}  # fmt: skip


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_machine_without_a_fault(sound: pytest.MonkeyPatch, built_store: Path) -> None:
    assert faults(built_store) == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_what_to_do(sound: pytest.MonkeyPatch, built_store: Path, fault: str) -> None:
    fake, name, status, advice = FAULTS[fault]
    fake(sound)
    ((named, (found_status, _, found_advice)),) = faults(built_store).items()
    assert (named, found_status) == (name, status)
    assert advice in found_advice


def test_an_old_kernel_is_right_on_an_old_cpu(sound: pytest.MonkeyPatch) -> None:
    sound.setattr(doctor, "loaded_kernels", lambda: {"numpy": "Nehalem"})
    sound.setattr(doctor, "torch", devices(["H100"], cpu="DEFAULT"))
    assert faults() == {}


def test_a_gpu_that_torch_does_not_see(sound: pytest.MonkeyPatch) -> None:
    sound.setattr(doctor, "torch", devices([]))
    sound.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    assert faults()["devices"][0] == "warn"
    sound.setattr(doctor, "torch", devices(["V100"], bfloat16=False))
    assert faults() == {}
    assert "V100, without bfloat16" in next(one.found for one in doctor.doctor().checks if one.name == "devices")


def test_what_there_is_here(store_copy: Path, cli: Cli) -> None:
    before = contents_of(store_copy)
    done = cli("doctor", store_copy, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0 and {"versions", "devices", "OpenBLAS", "cores", "durable write"} <= checks.keys()
    assert f"numpy {metadata.version('numpy')}" in checks["versions"]["found"]
    assert contents_of(store_copy) == before
    missing = cli("doctor", store_copy.parent / "nowhere")
    assert missing.returncode == 1 and "\nfail  store " in missing.stdout and "retrotool chunk" in missing.stdout
