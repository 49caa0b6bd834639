"""Why a provider cannot run on a machine, in words: judged from what routing knows of it."""

import re
from typing import Any

from nsa_fa2.providers import cudnn, torch_flash

OLDEST_SM = 80
OLDEST_CUDNN = 90_000  # as cuDNN writes 9.0.0


def no_flash_attn(environment: Any) -> str | None:
    """Why the package flash-attn cannot run; None if it can.

    Example:
        >>> from types import SimpleNamespace
        >>> no_flash_attn(SimpleNamespace(sm=90, flash_attn=None))
        'needs flash-attn >=2.8,<3: pip install --no-build-isolation flash-attn'
    """
    reason = _no_gpu(environment)
    if reason is not None:
        return reason
    if environment.flash_attn is None:
        return "needs flash-attn >=2.8,<3: pip install --no-build-isolation flash-attn"
    version = re.match(r"2\.(\d+)", environment.flash_attn)  # such as 2.8.3.post2
    if version is None or int(version[1]) < 8:
        return f"needs flash-attn >=2.8,<3, got {environment.flash_attn}"
    return None


def no_torch_flash(environment: Any) -> str | None:
    """Why torch's own FlashAttention-2 cannot run; None if it can."""
    reason = _no_gpu(environment)
    if reason is None and not torch_flash.is_known():
        return f"needs torch 2.7 or newer, got {environment.torch}"
    return reason


def no_cudnn(environment: Any) -> str | None:
    """Why cuDNN's attention cannot run; None if it can."""
    reason = _no_gpu(environment)
    if reason is not None:
        return reason
    if not cudnn.is_known():
        return f"needs torch 2.5 or newer, got {environment.torch}"
    version = getattr(environment, "cudnn", None)
    if version is None:
        return "needs cuDNN 9, got none"
    return None if version >= OLDEST_CUDNN else f"needs cuDNN 9, got {version}"


def _no_gpu(environment: Any) -> str | None:
    if environment.sm is None:
        return "needs an NVIDIA GPU"
    if environment.sm < OLDEST_SM:
        return f"needs SM 8.0 or newer, got {environment.sm / 10}"
    return None
