"""Which exceptions of a backend are its own failure, so that another one may take over. All others propagate."""

from subprocess import CalledProcessError

import torch

OUT_OF_MEMORY = "ran out of memory"
COMPILE_ERROR = "failed to compile"

NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
NO_COMPILER = (
    "Failed to find C compiler",
    "PassManager::run failed",
    "Internal Triton PTX codegen error",
    "was built without a kernel",  # a library that leaves some out, found by the backend over it
    "does not load",  # a library built for another torch
)


def failure_kind(error: BaseException) -> str | None:
    """OUT_OF_MEMORY, COMPILE_ERROR, or None for an exception that must reach the caller.

    Example:
        >>> failure_kind(MemoryError()), failure_kind(ValueError("q: expected ..."))
        ('ran out of memory', None)
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError):  # of what has no type of its own
        if any(words in str(error) for words in NO_MEMORY):
            return OUT_OF_MEMORY
        if any(words in str(error) for words in NO_COMPILER):
            return COMPILE_ERROR
    if isinstance(error, CalledProcessError):  # Triton's call of the C compiler
        return COMPILE_ERROR
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    # By name, so that triton is not imported to find out. Its interpreter wraps whatever a kernel raises: not a
    # compile error.
    if "triton.runtime.errors.InterpreterError" in names:
        return None
    if names & {"triton.errors.TritonError", "triton.compiler.errors.CompilationError"}:
        return COMPILE_ERROR
    return COMPILE_ERROR if "triton.runtime.errors.OutOfResources" in names else None
