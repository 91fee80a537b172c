"""Memory planning for generated C: decides where `minw.export.c` keeps each value."""

import math
from typing import Any, NamedTuple, Sequence

import numpy as np

from minw import packed

_MAX_DEPTH = 4  # Largest allowed depth of nested calls between functions of values.


class Plane(NamedTuple):
  """A value that is kept one channel at a time while another value is computed.

  Attributes:
    value: Index of the value.
    first: Channel of the computed value that needs channel 0 of the plane.
    reader: Index of the value that reads the plane: the computed value itself, or
      another plane.
  """

  value: int
  first: int
  reader: int


class _Buffer(NamedTuple):
  """A value in the arena: its first word and the one past it, its birth and death."""

  value: int
  start: int
  end: int
  born: tuple[float, float]
  dies: tuple[float, float]


class Memory:
  """The memory plan of a program: which values are kept, and at which offsets.

  Values are named by their index: 0 is the image, and i is the result of the i-th
  operation, counted from 1.

  Attributes:
    kinds: Shape, kind, bits and bound of each value.
    stored: Values that are kept whole, in order.
    planes: Planes that each channel of a value needs, in the order in which they are
      computed. The keys are the stored values and the last value.
    depth: Largest depth of nested calls between the functions of values.
    offsets: Offsets of stored values and planes in the arena, in words of 32 bits.
    words: Size of the arena, in words of 32 bits.
  """

  def __init__(self, program: packed.Program, kinds: Sequence[packed.Value],
               by_row: bool = False):
    """Plans the memory.

    Args:
      program: The network.
      kinds: What is known of its values.
      by_row: Whether only whole rows of a value take the place of rows of its input.
        Each buffer then overlaps less with its input, but buffers are placed one after
        the other, and all of them together may fit better.
    """
    self.kinds, self._by_row = kinds, by_row
    self._ops = program.ops
    self._signs = packed.only_signs(program)
    self._readers: list[list[int]] = [[] for _ in kinds]
    for k, op in enumerate(program.ops, start=1):
      for j in packed.inputs(op):
        self._readers[j].append(k)
    self.stored = [i for i in range(1, len(program.ops)) if self._is_stored(i)]
    self._planes: set[int] = set()
    self.depth = self._find_planes()
    roots = [*self.stored, len(program.ops)]
    reads, planes = self._find_sources()
    self.planes = {root: planes[root] for root in roots}
    self._placed: list[_Buffer] = []
    self.offsets = self._place(reads)

  def bits(self, i: int) -> int:
    """Bits that a code is stored in.

    A value of signs needs a second bit if there are zeros among them.
    """
    return 2 if self.kinds[i].bits == 1 and not self._signs[i] else self.kinds[i].bits

  def pixel(self, i: int) -> int:
    """Number of words that a pixel of a stored value or of a plane takes."""
    if i in self._planes:
      return 1
    c = self.kinds[i].shape[2]
    return c if self.kinds[i].kind == "INT" else -(-c // 32) * self.bits(i)

  def is_plane(self, i: int) -> bool:
    """Whether a value is kept one channel at a time."""
    return i in self._planes

  def is_apart(self, i: int) -> bool:
    """Whether the only reader of a value is a sum or a concatenation.

    Such a reader calls the functions of several values for one element.
    """
    return len(self._readers[i]) == 1 and isinstance(
        self._ops[self._readers[i][0] - 1], packed.Add | packed.Concat)

  def is_term(self, i: int) -> bool:
    """Whether a value is a sum that is inlined into its only reader, another sum."""
    if i in self.stored or i in self._planes or not i < len(self._ops):
      return False
    reader, = self._readers[i]
    return all(isinstance(self._ops[k - 1], packed.Add) for k in (i, reader))

  def _sum(self, i: int) -> packed.Add:
    """The addition that makes a value."""
    op = self._ops[i - 1]
    assert isinstance(op, packed.Add)
    return op

  def terms(self, i: int) -> list[tuple[int, int]]:
    """The values that a sum adds, each with its shift; nested sums are flattened."""
    op, found = self._sum(i), []
    rest = [(op.b, op.shift_b), (op.a, op.shift_a)]
    while rest:
      j, shift = rest.pop()
      if j and self.is_term(j):
        op = self._sum(j)
        rest += [(op.b, shift + op.shift_b), (op.a, shift + op.shift_a)]
      else:
        found.append((j, shift))
    return found

  def _is_stored(self, i):
    readers = self._readers[i]
    return self.kinds[i].kind == "CODE" or len(readers) != 1 or isinstance(
        self._ops[readers[0] - 1], packed.Conv)

  def _find_planes(self):
    """Finds the values that are planes; returns the largest depth of nested calls."""
    depth = [0] * len(self.kinds)
    for i in range(1, len(self.kinds)):
      for j in packed.inputs(self._ops[i - 1]):
        if j and j not in self.stored and j not in self._planes:
          depth[i] = max(depth[i], depth[j] - self.is_term(j))
      depth[i] += 1
      if i not in self.stored and i < len(self._ops):
        if depth[i] >= _MAX_DEPTH or self._overlaps(*self._readers[i]):
          self._planes.add(i)
    return max(depth)

  def _overlaps(self, i):
    """Whether a value is the result of a pool whose windows overlap."""
    op = self._ops[i - 1]
    return isinstance(op, packed.Pool) and any(
        n > step and size > 1
        for n, step, size in zip(op.window, op.strides, self.kinds[i].shape))

  def _find_sources(self):
    """Returns the stored values and the planes that each value is computed from.

    The walk goes from the image to the last value. A value that is not kept passes its
    own sources on to its readers. On the way, the `first` of a plane counts from
    channel 0 of the current value. Its `reader` is 0 until the walk meets a value that
    is kept or the last value, which then is the reader.
    """
    reads, planes = [set() for _ in self.kinds], [[] for _ in self.kinds]
    for i, op in enumerate(self._ops, start=1):
      first = 0
      for j in packed.inputs(op):
        if j in self.stored:
          reads[i].add(j)
        else:
          reads[i] |= reads[j]
          planes[i] += [p._replace(first=first + p.first) for p in planes[j]]
          if j in self._planes:
            planes[i].append(Plane(j, first, 0))
        if isinstance(op, packed.Concat):
          first += self.kinds[j].shape[2]
      if i in self._planes or i in self.stored or i == len(self._ops):
        planes[i] = [p._replace(reader=p.reader or i) for p in planes[i]]
    return reads, planes

  def _place(self, reads):
    """Returns the offsets of all buffers in the arena, and sets its size.

    Each buffer goes where the arena grows least, among the places that are free during
    its lifetime. A time is a pair (stored value being computed, number of its planes
    that have been computed). The planes of a stored value are computed again for each
    of its channels. Therefore every stored value that it reads, and the value itself,
    lives until all of it is computed.

    A value without planes is computed row by row. Its pixels may take the place of
    those of its inputs that are not read any more:

        result     | row 0 | row 1 | row 2 | ...
        input              | row 0     | row 1     | row 2     | ...
    """
    last = {i: i for i in self.stored}
    for i in self.planes:
      for j in reads[i]:
        last[j] = i
    for root, planes in self.planes.items():
      step = {plane.value: k for k, plane in enumerate(planes, start=1)}
      buffers: list[Any] = [(plane.value, (root, step[plane.value]),
                  (root, step.get(plane.reader, len(planes) + 1))) for plane in planes]
      if root in last:
        buffers.insert(0, (root, (root, 0), (last[root], math.inf)))
      for i, born, dies in buffers:
        h, w, _ = self.kinds[i].shape
        size, taken = h * w * self.pixel(i), []
        for other in self._placed:
          if other.dies >= born:
            start = other.start
            if i == root and not planes and last.get(other.value) == i:
              start += size + self._lag(i, other.value)
            taken.append((start, other.end))
        at = self._best_place(size, taken)
        self._placed.append(_Buffer(i, at, at + size, born, dies))
    first = min((p.start for p in self._placed), default=0)
    self._placed = [p._replace(start=p.start - first, end=p.end - first)
                    for p in self._placed]
    self.words = max((p.end for p in self._placed), default=0)
    return {p.value: p.start for p in self._placed}

  def _best_place(self, size: int, taken: list[tuple[int, int]]) -> int:
    """Returns the offset where a buffer enlarges the arena least. It may be negative.

    Args:
      size: Size of the buffer.
      taken: The first word, and the one past the last word, of each part of the arena
        that the buffer must not touch.
    """
    low = min((p.start for p in self._placed), default=0)
    high = max((p.end for p in self._placed), default=0)
    free = [at for at in (0, *(a - size for a, _ in taken), *(b for _, b in taken))
            if all(at + size <= a or at >= b for a, b in taken)]
    return min(free, key=lambda at: (max(high, at + size) - min(low, at), at))

  def _lag(self, i: int, j: int) -> int:
    """Returns the greatest offset of a value from its input, which it overwrites.

    Pixels of value i are computed row by row, and at most two of a row together. While
    pixel (y, x) is computed, those up to (y, x + 1) may be written already. They may
    take any place before the first pixel of value j that is read then or later. It is
    read by (y, x) itself or by the first pixel of the next row.

    Returns:
      A negative number of words.
    """
    rows, columns = self._first_reads(i, j, 0), self._first_reads(i, j, 1)
    width = self.kinds[j].shape[1]
    later = np.append(rows[1:], self.kinds[j].shape[0]) * width + columns[0]
    read = np.minimum(rows[:, None] * width + columns, later[:, None])
    x = np.arange(len(columns))
    y = np.arange(len(rows))[:, None]
    written = y * len(x) + np.minimum(x + 2, len(x))
    if self._by_row:
      read, written = read[:, 0], written[:, -1]
    return int((read * self.pixel(j) - written * self.pixel(i)).min())

  def _first_reads(self, i: int, j: int, axis: int) -> np.ndarray:
    """Returns the first row of value j that each row of value i is computed from.

    Args:
      i: Index of a value.
      j: Index of a value that it is computed from.
      axis: 0, or 1 for columns in place of rows.
    """
    reads = {j: np.arange(self.kinds[j].shape[axis])}
    for k in range(j + 1, i + 1):
      op, at = self._ops[k - 1], np.arange(self.kinds[k].shape[axis])
      if isinstance(op, packed.Conv | packed.Pool | packed.Shortcut):
        at *= op.strides[axis]
      if isinstance(op, packed.Conv | packed.Pool):
        at -= op.pads[2 * axis]
      first = [reads[m][at.clip(0, len(reads[m]) - 1)] for m in packed.inputs(op)
               if m in reads]
      if first and (k == i or k not in self.stored):
        reads[k] = np.min(first, 0)
    return reads[i]

  def room(self, i: int) -> tuple[int, int]:
    """Returns the greatest part of the arena that is free while value i is computed.

    Returns:
      Its offset and its size, in words of 32 bits.
    """
    gaps, at = [], 0
    for start, end in [*self._taken(i), (self.words, self.words)]:
      gaps.append((start - at, at))
      at = max(at, end)
    size, at = max(gaps)
    return at, size

  def make_room(self, i: int, words: int):
    """Enlarges the arena, so that `words` of it are free while value i is computed."""
    if self.room(i)[1] < words:
      self.words = max(end for _, end in self._taken(i)) + words

  def _taken(self, i):
    """Returns where the buffers are that are needed while value i is computed."""
    return sorted((p.start, p.end) for p in self._placed
                  if p.born < (i + 1, 0) and p.dies >= (i, 0))
