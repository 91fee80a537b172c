"""The numbers in the rules of the .minw format, and the error for what breaks a rule.

docs/format.md states the rules. The native library holds the same numbers in
minw/kernels/csrc, and a test compares them.
"""

from minw import text

MAX_FILE = 2 ** 30  # Largest file, in bytes.
MAX_OPS = 2 ** 12  # Largest number of operations.
MAX_SIZE = 2 ** 16  # Largest height, width or number of channels.
MAX_ELEMENTS = 2 ** 24  # Largest number of elements of an image or another value.
MAX_PADDED = 2 ** 26  # Largest number of elements of a value with its padding.
MAX_CHANNELS = 2 ** 22  # Largest number of channels of all values together.
MAX_STEP = 64  # Largest stride, dilation or padding.
MAX_SHIFT = 23  # Largest shift of an integer, in bits.
MAX_SUM = 2 ** 31 - 1  # Largest magnitude of an INT.
MAX_LOGIT_SUM = 2 ** 24  # Largest magnitude of an INT that float32 must hold exactly.
MAX_EXPONENT = 40  # Every FLOAT is below 2 ** MAX_EXPONENT in magnitude.

# Smallest and largest magnitude of a float constant that is not 0. Within them logits
# never overflow, and no intermediate result is subnormal. Some backends replace
# subnormal numbers by 0.
LEAST_CONSTANT, MOST_CONSTANT = 2.0 ** -40, 2.0 ** 40
# Smallest magnitude of a constant that is added last. Nothing is multiplied with it.
LEAST_ADDED = 2.0 ** -100


def require(ok: bool, name: str, problem: str) -> None:
  """Raises an error unless a rule holds.

  Args:
    ok: Whether the rule holds.
    name: Name of the operation that the rule is about, or "".
    problem: What is wrong, for the error message.

  Raises:
    ValueError: The rule does not hold.
  """
  if not ok:
    layer = f", layer {text.shortened(name)}" if name else ""
    raise ValueError(f"packed network{layer}: {problem}")


def size(n: int, name: str) -> int:
  """Returns `n`, a height, a width or a number of channels, if it is allowed.

  Args:
    n: The number.
    name: Name of the operation that it belongs to, or "image".

  Raises:
    ValueError: It is not allowed.
  """
  require(1 <= n <= MAX_SIZE, name, f"a size of {n}; it is 1 to {MAX_SIZE}")
  return n
