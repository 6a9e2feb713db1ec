"""A KV cache in buffers of a fixed length: nothing is copied to make room."""

from torch import Tensor


class KvCache:
    """Keys and values of every layer in buffers of `length` positions; the next ones go to `position`.

    A decode step that always goes to the same position can be a CUDA graph.
    """

    def __init__(self, length: int) -> None:
        self.position = 0
        self._length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put keys and values [batch, kv heads, tokens, head_dim] at `position`; return all up to their end."""
        if layer not in self._layers:
            batch, heads, _, head_dim = key.shape
            shape = (batch, heads, self._length, head_dim)
            self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        end = self.position + key.shape[2]
        keys, values = self._layers[layer]
        keys[:, :, self.position : end] = key
        values[:, :, self.position : end] = value
        return keys[:, :, :end], values[:, :, :end]
