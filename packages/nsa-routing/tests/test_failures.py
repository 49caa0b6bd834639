"""Which exceptions are a backend's own failure, and which must reach the caller?"""

import pytest
import torch
from nsa_routing.failures import COMPILE_ERROR, OUT_OF_MEMORY, failure_kind


def as_if_from(module: str, name: str, *bases: type) -> type[Exception]:
    """An exception class that says it comes from `module`: triton's, without triton."""
    return type(name, bases or (Exception,), {"__module__": module})


TRITON = as_if_from("triton.errors", "TritonError")
COMPILATION = as_if_from("triton.compiler.errors", "CompilationError", TRITON)
FAILED_MALLOC = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error, kind",
    [
        (MemoryError(), OUT_OF_MEMORY),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (RuntimeError(FAILED_MALLOC), OUT_OF_MEMORY),
        (TRITON("x"), COMPILE_ERROR),
        (COMPILATION("x"), COMPILE_ERROR),
        (as_if_from("triton.compiler.errors", "CompileTimeAssertionFailure", COMPILATION)("x"), COMPILE_ERROR),
        (as_if_from("triton.compiler.errors", "CompilationError")("x"), COMPILE_ERROR),
        (as_if_from("triton.runtime.errors", "OutOfResources")("out of shared memory"), COMPILE_ERROR),
        (as_if_from("triton.runtime.errors", "PTXASError", TRITON)("x"), COMPILE_ERROR),
        (RuntimeError("PassManager::run failed"), COMPILE_ERROR),
    ],
)
def test_a_backends_own_failure(error: Exception, kind: str) -> None:
    assert failure_kind(error) == kind


@pytest.mark.parametrize(
    "error",
    [
        ValueError("q: expected 3 dimensions"),
        TypeError("q: expected a tensor"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match"),
        RuntimeError("before PassManager::run failed"),
        ValueError(FAILED_MALLOC),
        AssertionError(),
        KeyboardInterrupt(),
        as_if_from("triton.runtime.errors", "InterpreterError", TRITON)("what a kernel raised"),
        as_if_from("not_triton.errors", "TritonError")("x"),
        as_if_from("ours", "CompilationError")("x"),
        as_if_from("ours", "OutOfResources")("x"),
    ],
    ids=repr,
)
def test_what_must_reach_the_caller(error: BaseException) -> None:
    assert failure_kind(error) is None


def test_these_are_tritons_names() -> None:
    """Where Triton is installed: its classes are where they are looked for by name."""
    errors = pytest.importorskip("triton.compiler.errors")
    runtime = pytest.importorskip("triton.runtime.errors")
    assert failure_kind(errors.CompilationError(None, None, "x")) == COMPILE_ERROR
    assert failure_kind(runtime.OutOfResources(2, 1, "shared memory")) == COMPILE_ERROR
    assert failure_kind(runtime.InterpreterError("x")) is None
