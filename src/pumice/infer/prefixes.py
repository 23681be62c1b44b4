"""Keys and values of prompts already read: a beginning that two requests share is read once.

A radix tree. A path from the root spells the beginning of a prompt, and each node holds the keys
and values of its positions. Causal attention makes them a function of that beginning alone, so
any cut is right. What has not been used for longest goes first when memory is short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pumice.infer.cache import BatchCache, Pieces, PromptCache


class _Node:
    """A run of positions: what stands there, and its keys and values in every layer."""

    __slots__ = ("children", "parent", "pieces", "symbols")

    def __init__(self, symbols: Sequence[int], pieces: Pieces, parent: _Node | None) -> None:
        self.symbols = symbols
        self.pieces = pieces
        self.parent = parent
        self.children: dict[int, _Node] = {}

    @property
    def bytes(self) -> int:
        """What its tensors hold."""
        return sum(piece.nbytes for piece in self.pieces)


class PrefixStore:
    """Beginnings of prompts by their symbols: token ids, and numbers that name image positions."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._root = _Node((), [], None)
        # The order of last use; a parent always stands behind its children.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self.bytes = 0
        self.positions = 0

    def known(self, symbols: Sequence[int]) -> int:
        """How many leading positions are held."""
        return sum(count for _, count in self._path(symbols))

    def fill(self, symbols: Sequence[int], cache: PromptCache) -> int:
        """Appends what is held of the beginning to an empty cache of one row; its length."""
        path = self._path(symbols)
        for node, count in path:
            cache.extend([piece[..., :count, :] for piece in node.pieces])
        self._touch([node for node, _ in path])
        return sum(count for _, count in path)

    def add(
        self, symbols: Sequence[int], cache: PromptCache | BatchCache, row: int, first: int
    ) -> None:
        """Keeps the row of a cache whose positions begin at column `first`, if it may keep any."""
        if not self.max_bytes:
            return
        path = self._path(symbols)
        known = sum(count for _, count in path)
        parent = self._root
        if path:
            parent, count = path[-1]
            if count < len(parent.symbols) and known < len(symbols):
                parent = self._split(parent, count)
        if known < len(symbols):
            pieces = cache.pieces(row, first + known, first + len(symbols))
            node = self._insert(_Node(symbols[known:], pieces, parent))
            parent = node
        self._touch(self._line(parent))
        while self.bytes > self.max_bytes and self._order:
            self._remove(next(iter(self._order)))

    def _path(self, symbols: Sequence[int]) -> list[tuple[_Node, int]]:
        """The nodes that spell the beginning, and how much of each agrees."""
        path: list[tuple[_Node, int]] = []
        node, at = self._root, 0
        while at < len(symbols) and symbols[at] in node.children:
            node = node.children[symbols[at]]
            count = common_length(node.symbols, symbols[at : at + len(node.symbols)])
            path.append((node, count))
            at += count
            if count < len(node.symbols):
                break
        return path

    def _split(self, node: _Node, count: int) -> _Node:
        """Cuts a node in two; -> the first half. Both are copies, so that either can go alone."""
        parent = node.parent
        assert parent is not None
        halves = [
            [piece[..., part, :].clone() for piece in node.pieces]
            for part in (slice(count), slice(count, None))
        ]
        head = _Node(node.symbols[:count], halves[0], parent)
        tail = _Node(node.symbols[count:], halves[1], head)
        tail.children = node.children
        for child in tail.children.values():
            child.parent = tail
        self._forget(node)
        self._insert(tail)
        return self._insert(head)

    def _insert(self, node: _Node) -> _Node:
        assert node.parent is not None
        node.parent.children[node.symbols[0]] = node
        self._order[node] = None
        self.bytes += node.bytes
        self.positions += len(node.symbols)
        return node

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[node.symbols[0]]
        self._forget(node)

    def _forget(self, node: _Node) -> None:
        del self._order[node]
        self.bytes -= node.bytes
        self.positions -= len(node.symbols)

    def _line(self, node: _Node) -> list[_Node]:
        """The nodes from the root's child down to this one."""
        line: list[_Node] = []
        while node.parent is not None:
            line.append(node)
            node = node.parent
        return line[::-1]

    def _touch(self, line: Sequence[_Node]) -> None:
        for node in reversed(line):
            self._order.move_to_end(node)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading symbols agree."""
    least, most = 0, min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    while most - least > 1:
        middle = (least + most) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle
    return least
