"""CUDA graphs: a network's calls recorded once per input size and replayed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_MOST_GRAPHS = 8
"""Sizes whose graphs are kept; each holds the memory of its maps."""

_WARM_UP = 3


class GraphReplay(nn.Module):
    """Runs a network on a GPU by replaying what was recorded for inputs of the same shape.

    The channels come last, which is what half-precision convolutions want. One thread at a time: a
    graph has one place for its input. Written without a GPU at hand: its bookkeeping is tested with
    a stand-in for the recorder, its speed is not known.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self._recorded: OrderedDict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Any]] = OrderedDict()

    def forward(self, images: Tensor) -> Any:
        images = images.contiguous(memory_format=torch.channels_last)
        if not _is_replayed(images):
            return self.network(images)
        # what is recorded in inference mode could not be written to outside it
        with _device_of(images), torch.inference_mode(False), torch.no_grad():
            return self._replayed(images)

    def _replayed(self, images: Tensor) -> Any:
        key = (tuple(images.shape), images.dtype)
        if key not in self._recorded:
            self._recorded[key] = self._record(images)
            if len(self._recorded) > _MOST_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        graph, inputs, scores = self._recorded[key]
        inputs.copy_(images)
        graph.replay()
        if isinstance(scores, Tensor):
            return scores.clone()
        return tuple(s.clone() for s in scores)

    def _record(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        inputs = images.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.network(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores = self.network(inputs)
        return graph, inputs, scores

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphReplay:
        return GraphReplay(copy.deepcopy(self.network, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorded": OrderedDict()}


def _is_replayed(images: Tensor) -> bool:
    return images.is_cuda and not torch.compiler.is_compiling()


def _device_of(images: Tensor) -> AbstractContextManager[Any]:
    """Makes the images' GPU the current one, whose streams are recorded."""
    return torch.cuda.device(images.device) if images.is_cuda else nullcontext()
