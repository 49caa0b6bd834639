"""Numbers of a device on their way to the host, which does not wait for them."""

import torch
from torch import Tensor


class LaterCopy:
    """Copies of a tensor that arrive some time later: at once on a CPU, in pinned memory from a GPU.

    Example:
        >>> copy = LaterCopy(torch.tensor([1.0, 2.0]))
        >>> copy.start()
        >>> copy.landed(), copy.values()
        (True, [1.0, 2.0])
    """

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._event: torch.cuda.Event | None = None
        with torch.inference_mode(False):
            pinned = source.device.type == "cuda"
            self._copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=pinned)
        if source.device.type == "cuda":
            self._event = torch.cuda.Event()

    def start(self) -> None:
        """Copy what the source holds once the work that is queued now is done. Not while an earlier copy is wanted."""
        self._copy.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._source.device))

    def landed(self) -> bool:
        """Whether the copy is there. Asks, and does not wait; not to be called while a graph is captured."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """The copy, once it landed."""
        values: list[float] = self._copy.tolist()
        return values
