"""Which exceptions are a backend's own failure, and which must reach the caller?"""

from subprocess import CalledProcessError

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
        (RuntimeError("Internal Triton PTX codegen error\n`ptxas` stderr: ..."), COMPILE_ERROR),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), COMPILE_ERROR),
        (RuntimeError("flash-attn does not load: undefined symbol: _ZN3c105Error"), COMPILE_ERROR),
        (RuntimeError("flash-attn 2.8.3 was built without a kernel for head_dim 192 in torch.bfloat16"), COMPILE_ERROR),
        (CalledProcessError(1, ["gcc", "main.c"]), COMPILE_ERROR),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OUT_OF_MEMORY),
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
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
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
