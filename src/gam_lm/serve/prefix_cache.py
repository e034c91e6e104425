"""States by the text that they have read, so that a text that goes on from an earlier one pays for its new tokens alone.

A radix tree over token ids: an edge is a run of ids, and a node may hold the state after all ids on the way to it. What was not used for the longest time
goes first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S")

WIDTH = 4
"""Bytes of an id."""


class Found(NamedTuple, Generic[S]):
    """What the cache knows of a text."""

    tokens: int
    """Ids that the state has read."""
    state: S | None
    """None where ``tokens`` is 0."""
    shared: int
    """Ids at the start that an earlier text had too, whether or not a state was kept there."""


class _Node(Generic[S]):
    __slots__ = ("children", "edge", "nbytes", "parent", "state")

    def __init__(self, edge: bytes, parent: _Node[S] | None) -> None:
        self.edge, self.parent = edge, parent
        self.children: dict[bytes, _Node[S]] = {}
        self.state: S | None = None
        self.nbytes = 0


class PrefixCache(Generic[S]):
    """A bounded number of bytes of states.

    Args:
        capacity: bytes of states and ids that are kept at most.
        size: bytes of a state.
    """

    def __init__(self, capacity: int, size: Callable[[S], int]) -> None:
        self.capacity, self._size = capacity, size
        self.nbytes = 0
        """Bytes held."""
        self._root: _Node[S] = _Node(b"", None)
        self._used: OrderedDict[_Node[S], None] = OrderedDict()

    def __len__(self) -> int:
        """States held."""
        return len(self._used)

    def find(self, ids: Sequence[int]) -> Found[S]:
        """The state that has read the longest start of ``ids``."""
        path = _packed(ids)
        node, place, best, tokens = self._root, 0, None, 0
        while True:
            if node.state is not None:
                best, tokens = node, place // WIDTH
            child = node.children.get(path[place : place + WIDTH])
            if child is None:
                break
            same = _common(child.edge, path, place)
            place += same
            if same < len(child.edge):
                break
            node = child
        if best is None:
            return Found(0, None, place // WIDTH)
        self._used.move_to_end(best)
        return Found(tokens, best.state, place // WIDTH)

    def keep(self, ids: Sequence[int], state: S) -> None:
        """Keep the state that has read ``ids``; one that is larger than the whole cache is not kept."""
        path, size = _packed(ids), self._size(state)
        if not path or size + len(path) > self.capacity:
            return
        node, place = self._root, 0
        while place < len(path):
            child = node.children.get(path[place : place + WIDTH])
            if child is None:
                child = _Node(path[place:], node)
                node.children[path[place : place + WIDTH]] = child
                self.nbytes += len(child.edge)
            elif (same := _common(child.edge, path, place)) < len(child.edge):
                child = self._split(child, same)
            place += len(child.edge)
            node = child
        self.nbytes += size - node.nbytes
        node.state, node.nbytes = state, size
        self._used[node] = None
        self._used.move_to_end(node)
        while self.nbytes > self.capacity and self._used:
            self._forget(next(iter(self._used)))

    def clear(self) -> None:
        """Forget everything."""
        self._root, self.nbytes = _Node(b"", None), 0
        self._used.clear()

    @staticmethod
    def _split(node: _Node[S], at: int) -> _Node[S]:
        """A node in the middle of the edge to ``node``."""
        parent = node.parent
        assert parent is not None
        middle: _Node[S] = _Node(node.edge[:at], parent)
        parent.children[middle.edge[:WIDTH]] = middle
        node.edge, node.parent = node.edge[at:], middle
        middle.children[node.edge[:WIDTH]] = node
        return middle

    def _forget(self, node: _Node[S]) -> None:
        """Drop a state, and the nodes that lead nowhere without it."""
        del self._used[node]
        self.nbytes -= node.nbytes
        node.state, node.nbytes = None, 0
        while node.parent is not None and node.state is None and not node.children:
            del node.parent.children[node.edge[:WIDTH]]
            self.nbytes -= len(node.edge)
            node = node.parent
        if node.parent is not None and node.state is None and len(node.children) == 1:
            (only,) = node.children.values()
            only.edge, only.parent = node.edge + only.edge, node.parent
            node.parent.children[only.edge[:WIDTH]] = only


def _packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _common(edge: bytes, path: bytes, start: int) -> int:
    """Bytes, in whole ids, that ``edge`` and ``path`` from ``start`` on have in common."""
    low, high = 0, min(len(edge), len(path) - start)
    if edge[:high] == path[start : start + high]:
        return high
    while high - low > WIDTH:  # the first low bytes are equal, the first high ones are not
        middle = (low + high) // 2 // WIDTH * WIDTH
        if edge[low:middle] == path[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return low
