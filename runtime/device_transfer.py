"""What a step sends to a device and what it takes back: one copy each way, whatever there is of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from angelforge.runtime.device import to_host

_TORCH = {np.dtype(name): getattr(torch, name) for name in ("int32", "int64", "float32", "float64")}
_NUMPY = {there: here for here, there in _TORCH.items()}


class Packed:
    """Arrays that go to a device in one copy, written where it is copied from; what is there already does not go."""

    def __init__(self, device: torch.device, before: Packed | None = None) -> None:
        """`before` is what was sent last: arrays that are the same objects again are taken from there."""
        self._device = device
        self._parts: list[tuple[str, Any]] = []
        self._sent: dict[str, torch.Tensor] = {}
        self._arrays: dict[str, Any] = {}
        self._before = before
        self.nbytes = 0  # to be sent

    def add(self, name: str, array: Any) -> None:
        """An array of a NumPy type that torch has, too; it must not change any more."""
        before = self._before
        self._arrays[name] = array
        if before is not None and before._arrays.get(name) is array:
            self._sent[name] = before._sent[name]
            return
        self._parts.append((name, array))
        self.nbytes += _padded(array.nbytes)

    def send(self) -> None:
        """One copy of all that is new; on a GPU from pinned memory, which torch keeps until the copy is done."""
        self._before = None
        if not self._parts:
            return
        host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        octets, places, begin = host.numpy(), [], 0
        for _, array in self._parts:
            octets[begin : begin + array.nbytes].view(array.dtype)[...] = array.reshape(-1)
            places.append(begin)
            begin += _padded(array.nbytes)
        there = host.to(self._device, non_blocking=True)
        typed: dict[Any, torch.Tensor] = {}
        for (name, array), begin in zip(self._parts, places, strict=True):
            whole = typed.get(array.dtype)
            if whole is None:
                whole = typed[array.dtype] = there.view(_TORCH[array.dtype])
            self._sent[name] = whole.as_strided(array.shape, _strides(array.shape), begin // array.itemsize)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._sent[name]

    def get(self, name: str) -> torch.Tensor | None:
        """None for what was not added."""
        return self._sent.get(name)


def _padded(nbytes: int) -> int:
    """Each array begins at a multiple of 16 bytes, so that kernels read it at full width."""
    return -(-nbytes // 16) * 16


def _strides(shape: tuple[int, ...]) -> list[int]:
    """In elements, of an array without gaps."""
    return [1] if len(shape) == 1 else [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


class Parcel:
    """Tensors of a device that come to the host in one copy: the one thing that a step waits for."""

    def __init__(self) -> None:
        self._parts: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of f32, f64, int32 or int64."""
        self._parts[name] = tensor

    def fetch(self) -> dict[str, Any]:
        """All of them as NumPy arrays, which may be written to.

        Raises AngelForgeError where the device fails in this or earlier work.
        """
        if len(self._parts) == 1:
            ((name, tensor),) = self._parts.items()
            return {name: to_host(tensor)}
        # The widest numbers first, so that each array begins where its type may.
        ordered = sorted(self._parts.items(), key=lambda part: -part[1].element_size())
        if not ordered:
            return {}
        octets = to_host(torch.cat([tensor.contiguous().flatten().view(torch.uint8) for _, tensor in ordered]))
        found, begin = {}, 0
        for name, tensor in ordered:
            end = begin + tensor.numel() * tensor.element_size()
            found[name] = octets[begin:end].view(_NUMPY[tensor.dtype]).reshape(tuple(tensor.shape))
            begin = end
        return found
