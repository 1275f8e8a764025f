"""How many bytes of tensors are alive at once, on any device, counted and not sampled."""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Live and peak bytes of the storages that operations under it return; views are counted once.

    What an operation allocates and frees within itself is not seen, so figures are the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and take notice of what it returns."""
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._see(output.untyped_storage())
        return outputs

    def reset_peak(self) -> None:
        """Begin anew to look for the peak."""
        self.peak_bytes = self.live_bytes

    def _see(self, storage: UntypedStorage) -> None:
        # torch keeps a storage's Python object for as long as the storage itself lives.
        key, num_bytes = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            forgetting = weakref.finalize(storage, self._forget, key, num_bytes)
            forgetting.atexit = False  # type: ignore[misc]  # The stub takes this property for a slot.

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes
