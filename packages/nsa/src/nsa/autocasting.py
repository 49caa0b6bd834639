"""What an autocast region does to the arguments of the attention operations: the same as to those of torch's."""

from typing import Any

import torch
from nsa_varlen.autograd import in_autocast
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What linear layers return on `device` inside an autocast region, None outside one.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast_dtype(torch.device("cpu"))
        torch.bfloat16
    """
    return torch.get_autocast_dtype(device.type) if in_autocast(device.type) else None


def autocast(*values: Any) -> tuple[Any, ...]:
    """`values` as `torch.nn.functional.scaled_dot_product_attention` takes them: inside an autocast region of their
    device floating tensors, unless they are fp64, arrive in the region's dtype. Gradients come back in their own.

    Anything else stays as it is, PagedKV too: to convert a pool of pages anew at every call is nothing to do unasked.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     [x.dtype for x in autocast(torch.ones(1), torch.ones(1, dtype=torch.float64))]
        [torch.bfloat16, torch.float64]
    """
    device = next((x.device for x in values if isinstance(x, Tensor)), None)
    dtype = None if device is None else autocast_dtype(device)
    return values if dtype is None else tuple(_cast(x, dtype) for x in values)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(dtype)
    return x
