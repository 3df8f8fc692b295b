"""A device that computes on the CPU and tells what would make a host wait for a GPU.

Its tensors say that they are on torch's "meta" device, so that torch itself neither mixes them with the host's nor
reads a number of them by itself; whatever crosses between the two is noted. What a GPU would refuse is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

FAR = torch.device("meta")
_COPIES = ("_to_copy", "copy_", "to.")
# Their results' sizes depend on numbers on the device, which the host has to ask for.
_SIZED_BY_DATA = (
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "bincount",
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
)


class Far(torch.Tensor):
    """A tensor on the far device."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=FAR
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("Far tensors are used within `watched` alone")


class Watch(TorchDispatchMode):
    """Counts what crosses: `fetches` (waits for the device; `fetched_bytes`), `sends`, `launches`, other `waits`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, for seconds, in order not to compile this."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.fetches, self.sends, self.launches, self.fetched_bytes = 0, 0, 0, 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), function.__name__.split(".")[0]
        flat, _ = tree_flatten((args, kwargs))
        far = any(isinstance(each, Far) for each in flat)
        wanted = kwargs.get("device")
        if not far and (wanted is None or torch.device(wanted) != FAR):
            return function(*args, **kwargs)
        near_args, near_kwargs = tree_map(_near, (args, kwargs))
        if name == "_to_copy" and wanted is not None:
            return self._copied(function, near_args, near_kwargs, far)
        if name == "copy_" and isinstance(args[0], Far) != isinstance(args[1], Far):
            return self._copied_into(args, near_args, kwargs)
        if name in _SIZED_BY_DATA:
            self.waits.append(name)
        self._refuse_mixtures(name, args)
        if wanted is not None:
            near_kwargs["device"] = torch.device("cpu")
        self.launches += not _is_view(function)
        return _far_like(function(*near_args, **near_kwargs), flat)

    def _copied(self, function: Any, args: Any, kwargs: dict[str, Any], far: bool) -> Any:
        there = torch.device(kwargs.pop("device")) == FAR
        if far and there:  # another type
            self.launches += 1
        elif there:
            self.sends += 1
            if not kwargs.get("non_blocking"):
                self.waits.append("a send that waits")
        else:
            self.fetches += 1
        kwargs.pop("non_blocking", None)
        result = function(*args, **kwargs).clone()
        self.fetched_bytes += 0 if there else result.nbytes
        return Far(result) if there else result

    def _copied_into(self, args: Any, near: Any, kwargs: dict[str, Any]) -> Any:
        if isinstance(args[0], Far):
            self.sends += 1
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.waits.append("a send that waits")
        else:
            self.fetches += 1
        near[0].copy_(near[1])
        return args[0]

    def _refuse_mixtures(self, name: str, args: Any) -> None:
        """A GPU takes numbers of the host (tensors without dimensions), and copies indices there, waiting."""
        for each in tree_flatten(args)[0]:
            if isinstance(each, torch.Tensor) and not isinstance(each, Far) and each.dim() > 0:
                assert name in ("index", "index_put", "index_put_"), f"{name} mixes devices"
                self.waits.append(f"{name} with indices of the host")
            if isinstance(each, Far) and each.dtype == torch.bool and name in ("index", "index_put", "index_put_"):
                self.waits.append(f"{name} with a mask")


@contextmanager
def watched() -> Iterator[Watch]:
    """Within it, tensors of `far` may be used."""
    with Watch() as watch:
        yield watch


def far(near: torch.Tensor) -> Any:
    """A tensor on the far device with these values."""
    return Far(near)


def _near(each: Any) -> Any:
    return each.near if isinstance(each, Far) else each


def _is_view(function: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns)


def _far_like(result: Any, inputs: Sequence[Any]) -> Any:
    known = {id(each.near): each for each in inputs if isinstance(each, Far)}

    def wrapped(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        own = known.get(id(each))  # an operation in place gives its own argument back
        return Far(each) if own is None else own

    leaves, spec = tree_flatten(result)
    return tree_unflatten([wrapped(each) for each in leaves], spec)
