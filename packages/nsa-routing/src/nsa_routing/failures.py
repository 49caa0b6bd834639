"""Which exceptions of a backend are its own failure, so that another one may take over. All others propagate."""

import torch

OUT_OF_MEMORY = "ran out of memory"
COMPILE_ERROR = "failed to compile"


def failure_kind(error: BaseException) -> str | None:
    """OUT_OF_MEMORY, COMPILE_ERROR, or None for an exception that must reach the caller.

    Example:
        >>> failure_kind(MemoryError()), failure_kind(ValueError("q: expected ..."))
        ('ran out of memory', None)
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error):
        return OUT_OF_MEMORY  # torch has no type for it
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    # By name, so that triton is not imported to find out. Its interpreter wraps whatever a kernel raises: not a
    # compile error. A failing compiler pass has no type of its own.
    if "triton.runtime.errors.InterpreterError" in names:
        return None
    if names & {"triton.errors.TritonError", "triton.compiler.errors.CompilationError"}:
        return COMPILE_ERROR
    if "triton.runtime.errors.OutOfResources" in names or str(error) == "PassManager::run failed":
        return COMPILE_ERROR
    return None
