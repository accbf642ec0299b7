"""One layer of keys and values on the host, in pieces, with the last tokens on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from minference.integrations.transformers.lane import Lane, Sent
from minference.ops.pack.api import pack_rows, unpack_rows

SEGMENT = 65_536
"""Most tokens of a piece of host memory; no piece is moved."""
TAIL = 1024
"""Tokens that decoding may add before they leave the device too."""


@dataclass(frozen=True)
class Piece:
    """Keys or values of some tokens on the host, [B, H, n, D]; as bytes with scales if packed."""

    data: Tensor
    scale: Tensor | None

    @classmethod
    def store(cls, x: Tensor, *, fp8: bool, pinned: bool) -> Piece:
        """Copies a part of a layer to the host."""
        if not fp8:
            return cls(_to_host(x, pinned), None)
        data, scale = pack_rows(x)
        return cls(_to_host(data, pinned), _to_host(scale, pinned))

    def load(self, out: Tensor) -> None:
        """Writes the numbers into a part of a layer on the device."""
        if self.scale is None:
            out.copy_(self.data, non_blocking=True)
            return
        data, scale = (x.to(out.device, non_blocking=True) for x in (self.data, self.scale))
        unpack_rows(data, scale, out)

    def map(self, change: Callable[[Tensor], Tensor]) -> Piece:
        """The same change to numbers and scales."""
        return Piece(change(self.data), None if self.scale is None else change(self.scale))

    def __len__(self) -> int:
        return self.data.shape[2]


def _to_host(x: Tensor, pinned: bool) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
    return host.copy_(x, non_blocking=pinned)


class HostLayer(CacheLayerMixin):
    """A layer whose first tokens are on the host and whose last ones on the device.

    `keys` and `values` are the whole, put together on the host each time.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, lanes: dict[torch.device, Lane], *, fp8: bool) -> None:
        self._lanes, self._fp8 = lanes, fp8
        self.following: HostLayer | None = None
        self.last = False
        self.reset()

    def reset(self) -> None:
        self._stored: list[tuple[Piece, Piece]] = []
        self._sent: list[Sent[list[tuple[Piece, Piece]]]] = []
        self._host_length = 0
        self._tail: tuple[Tensor, Tensor] | None = None
        self._ahead: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    def __getstate__(self) -> dict[str, object]:
        self._settle()
        return dict(self.__dict__)

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._on_host(0)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._on_host(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.device not in self._lanes:
            self._lanes[self.device] = Lane(self.device)
        self._lane = self._lanes[self.device]
        self._tail = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns the whole layer on the device."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states, value_states
        whole = self._whole(new) if self._host_length else self._joined(new)
        if self.following is not None and (not self.last or key_states.shape[2] < TAIL):
            self.following.fetch(key_states.shape[2])
        self._keep(new)
        return whole

    def fetch(self, new: int) -> None:
        """Starts to bring the layer to the device, with room for `new` tokens."""
        if not self._host_length or self._ahead is not None or self._tail is None:
            return
        length = self.get_seq_length() + new
        buffers = tuple(
            torch.empty((*x.shape[:2], length, x.shape[3]), dtype=self.dtype, device=self.device)
            for x in self._tail
        )
        pieces = self._pieces()
        with self._lane.behind(*buffers):
            at = 0
            for pair in pieces:
                for piece, buffer in zip(pair, buffers, strict=True):
                    piece.load(buffer[:, :, at : at + len(piece)])
                at += len(pair[0])
        self._ahead = buffers[0], buffers[1]

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        tail = 0 if self._tail is None else self._tail[0].shape[2]
        return self._host_length + tail

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes that many of the last tokens; a positive number is the length to keep."""
        stop = (
            tokens_to_remove if tokens_to_remove > 0 else self.get_seq_length() + tokens_to_remove
        )
        if stop >= self.get_seq_length() or self._tail is None:
            return
        self._ahead, at, pieces = None, 0, []
        for pair in self._pieces():
            rest = max(0, min(len(pair[0]), stop - at))
            at += len(pair[0])
            if rest:
                pieces.append(tuple(p.map(lambda x, n=rest: x[:, :, :n]) for p in pair))
        keys, values = (x[:, :, : max(0, stop - at)] for x in self._tail)
        self._stored, self._host_length = pieces, max(0, min(stop, at))
        self._tail = keys, values

    def _joined(self, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert self._tail is not None
        if not self._tail[0].shape[2]:
            return new
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self._tail, new, strict=True))
        return keys, values

    def _whole(self, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if (
            self._ahead is not None
            and self._ahead[0].shape[2] != self.get_seq_length() + new[0].shape[2]
        ):
            self._ahead = None
        self.fetch(new[0].shape[2])
        assert self._ahead is not None
        self._lane.join()
        whole, self._ahead = self._ahead, None
        for buffer, last in zip(whole, self._joined(new), strict=True):
            buffer[:, :, buffer.shape[2] - last.shape[2] :] = last
        return whole

    def _keep(self, new: tuple[Tensor, Tensor]) -> None:
        tail = self._joined(new)
        if tail[0].shape[2] < TAIL:
            self._tail = tail
            return
        sent = self._lane.send(partial(_store, tail, self._fp8, self._lane.pinned), *tail)
        self._sent.append(sent)
        self._host_length += tail[0].shape[2]
        self._tail = tail[0][:, :, :0].clone(), tail[1][:, :, :0].clone()

    def _pieces(self) -> list[tuple[Piece, Piece]]:
        """What is on the host, copies under way included."""
        while self._sent:
            self._stored += self._sent[0].issued()
            del self._sent[0]
        return self._stored

    def _settle(self) -> list[tuple[Piece, Piece]]:
        """What is on the host, all of it readable there."""
        if self._tail is not None:
            self._lane.drain()
        return self._pieces()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._ahead = None
        if self._tail is None:
            return
        self._stored = [(keys.map(change), values.map(change)) for keys, values in self._settle()]
        self._tail = change(self._tail[0]), change(self._tail[1])

    def _on_host(self, which: int) -> Tensor | None:
        if self._tail is None:
            return None
        pieces = self._settle()
        tail = self._tail[which].cpu()
        whole = tail.new_empty((*tail.shape[:2], self.get_seq_length(), tail.shape[3]))
        at = 0
        for pair in pieces:
            pair[which].load(whole[:, :, at : at + len(pair[which])])
            at += len(pair[which])
        whole[:, :, at:] = tail
        return whole


def piece_tokens(token_bytes: int) -> int:
    """Tokens of a piece: as many as fill a power of two, in which pinned memory comes."""
    whole = 1 << ((SEGMENT * token_bytes).bit_length() - 1)
    return max(1, whole // token_bytes)


def _store(tail: tuple[Tensor, Tensor], fp8: bool, pinned: bool) -> list[tuple[Piece, Piece]]:
    rows, dim = tail[0].shape[0] * tail[0].shape[1], max(x.shape[3] for x in tail)
    step = piece_tokens(rows * dim * (1 if fp8 else tail[0].element_size()))
    pieces = []
    for begin in range(0, tail[0].shape[2], step):
        keys, values = (
            Piece.store(x[:, :, begin : begin + step], fp8=fp8, pinned=pinned) for x in tail
        )
        pieces.append((keys, values))
    return pieces


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding layer that lets go of the prompt: a view of its end would hold all of it."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        whole = super().update(key_states, value_states, *args, **kwargs)
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return whole
