"""Memory planning for generated C: decides where `minw.export.c` keeps each value."""

import math
from typing import Any, NamedTuple, Sequence

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

  def __init__(self, program: packed.Program, kinds: Sequence[packed.Value]):
    self.kinds = kinds
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
    self.offsets, self.words = self._place(reads)

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
    """Returns the offsets of all buffers in the arena, and its size.

    Each buffer goes to the first gap that is free during its lifetime. A time is a pair
    (stored value being computed, number of its planes that have been computed). The
    planes of a stored value are computed again for each of its channels. Therefore
    every stored value that it reads, and the value itself, lives until all of it is
    computed.
    """
    last = {i: i for i in self.stored}
    for i in self.planes:
      for j in reads[i]:
        last[j] = i
    placed, offsets = [], {}
    for root, planes in self.planes.items():
      step = {plane.value: k for k, plane in enumerate(planes, start=1)}
      buffers: list[Any] = [(plane.value, (root, step[plane.value]),
                  (root, step.get(plane.reader, len(planes) + 1))) for plane in planes]
      if root in last:
        buffers.insert(0, (root, (root, 0), (last[root], math.inf)))
      for i, born, dies in buffers:
        h, w, _ = self.kinds[i].shape
        size, at = h * w * self.pixel(i), 0
        for start, end, other_dies in sorted(placed):
          if other_dies >= born and start < at + size and at < end:
            at = end
        placed.append((at, at + size, dies))
        offsets[i] = at
    return offsets, max((end for _, end, _ in placed), default=0)
