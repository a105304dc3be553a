"""Watches operations for what a GPU would do badly: waits of the host, copies to the device, wide numbers."""

import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: ".item()",
    aten.nonzero.default: "nonzero()",
    aten.masked_select.default: "masked_select()",
    aten.repeat_interleave.Tensor: "repeat_interleave() by a tensor",
    aten._unique2.default: "unique()",
    aten.equal.default: "equal()",
}
"""Operations for which the host waits for the device."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
PRODUCTS = {aten.mm.default, aten.addmm.default}
"""Without `bmm`, into which attention is decomposed where there is no GPU."""


class DeviceWatch(TorchDispatchMode):
    """Counts waits and copies from CPU to CUDA, and the dtypes of matrix products and of all results.

    Args:
        library: A library's folder, such as `/transformers/models/`: waits in its code count as `waits_in_library`.
    """

    def __init__(self, library=None):
        super().__init__()
        self._library, self.waits_in_library = library, Counter()
        self.waits, self.copies, self.products, self.dtypes = Counter(), Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if func in WAITS:
            self._count(WAITS[func])
        if func in INDEXING and any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1]):
            self._count("a boolean index")
        out = func(*args, **kwargs)
        results = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        if func in PRODUCTS:
            self.products[results[0].dtype] += 1
        for one in results:
            self.dtypes[one.dtype] += 1
            if one.is_cuda and any(not given.is_cuda and given.ndim for given in tensors):
                self.copies[str(func)] += 1
        return out

    def _count(self, wait):
        if self._library is None:
            self.waits[wait] += 1
            return
        files = [one.filename for one in traceback.extract_stack()]
        # In a backward pass it is neither: what waits there has waited in the forward pass, too.
        last = next((one for one in reversed(files) if "/src/rlinf_" in one or self._library in one), self._library)
        (self.waits_in_library if self._library in last else self.waits)[wait] += 1
