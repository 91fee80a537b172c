"""The metadata of a packed network: what a file may say besides its program.

They are a JSON object in UTF-8. `decode` and `encode` hold it to one schema:

    labels       one printable name for each class; null or [] where they have none
    config       the config of the run, see `minw.config_fields`, or null
    config_hash  hexadecimal digits that identify the config
    step         the step of the checkpoint

None of them has to be there. A file may hold other names, too, and its config other
fields: newer versions of minw and users add some, and this version ignores them. They
may hold any JSON within the limits below.

A file is not trusted. Its config says what a network was trained on and how images are
prepared. Paths and numbers of processes are never taken from it, and `LOCAL` names the
fields that are not written to it.
"""

import json
import math
import re
from typing import Any, Mapping

from minw import config_fields
from minw import text

# Fields of a config that say where a run was computed. Packed networks are shared with
# others, whom this does not concern.
LOCAL = (*config_fields.MACHINE, "init_from", "teacher")

# Largest metadata in a file. Python objects take about 30 times more.
MAX_BYTES = 2**22
_MAX_DEPTH = 16  # Deepest nesting of lists and objects.
_DEPTH = f"nested at most {_MAX_DEPTH} deep"
_MAX_DIGITS = 100  # Characters of an integer.
_MAX_STEP = 2**63 - 1
_MAX_NAME = 40  # Characters of a name in an error message.
_MAX_LABEL = 1000  # Characters of a label.
_HASH = re.compile("[0-9a-f]{1,128}")

_TYPES = {name: type(default) for section in config_fields.FIELDS.values()
          for name, (default, _) in section.items()}


def shared(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a config that a packed network holds: all but `LOCAL`."""
  return {name: value for name, value in config.items() if name not in LOCAL}


def encode(metadata: Mapping[str, Any], num_classes: int) -> bytes:
  """The bytes in a file that hold metadata.

  Args:
    metadata: What the file says besides its program.
    num_classes: Number of classes of the network.

  Raises:
    ValueError: They are no JSON, or `decode` would refuse them.
  """
  try:
    data = json.dumps(metadata, separators=(",", ":"), allow_nan=False).encode()
  except (TypeError, ValueError, RecursionError) as error:
    raise _refusal("metadata", metadata, f"JSON: {error}") from error
  decode(data, num_classes)
  return data


def decode(data: bytes, num_classes: int) -> dict[str, Any]:
  """The metadata that a file holds.

  Args:
    data: The bytes in the file.
    num_classes: Number of classes of the network.

  Returns:
    The JSON object.

  Raises:
    ValueError: It violates the schema. The message names the field, quotes its value
      and says what is allowed.
  """
  _check(len(data) <= MAX_BYTES, "metadata", data, f"at most {MAX_BYTES} bytes")
  try:
    found = json.loads(
        data.decode(), object_pairs_hook=_object, parse_int=_integer)
  except UnicodeDecodeError as error:
    raise _refusal("metadata", data, "UTF-8") from error
  except json.JSONDecodeError as error:
    raise _refusal("metadata", data, f"JSON: {error}") from error
  except RecursionError as error:
    raise _refusal("metadata", data, _DEPTH) from error
  _check(isinstance(found, dict), "metadata", found, "a JSON object")
  _check_json("metadata", found, 0)
  _check_labels(found.get("labels"), num_classes)
  _check_config(found.get("config"))
  if "config_hash" in found:
    value = found["config_hash"]
    _check(isinstance(value, str) and _HASH.fullmatch(value) is not None,
           "metadata.config_hash", value, "1 to 128 hexadecimal digits in lower case")
  if "step" in found:
    value = found["step"]
    _check(type(value) is int and 0 <= value <= _MAX_STEP, "metadata.step", value,
           f"an integer from 0 to {_MAX_STEP}")
  return found


def _check_labels(labels: Any, num_classes: int) -> None:
  if labels is None or labels == []:
    return
  field = "metadata.labels"
  _check(isinstance(labels, list), field, labels, "null or a list of strings")
  _check(len(labels) == num_classes, field, labels,
         f"one for each class; there are {len(labels)} labels for {num_classes}"
         " classes")
  for i, label in enumerate(labels):
    _check(isinstance(label, str) and label.isprintable() and len(label) <= _MAX_LABEL,
           f"{field}[{i}]", label,
           f"a printable string of at most {_MAX_LABEL} characters")


def _check_config(config: Any) -> None:
  _check(config is None or isinstance(config, dict), "metadata.config", config,
         "null or an object")
  for name, value in (config or {}).items():
    field, kind = f"metadata.config.{name}", _TYPES.get(name)
    if name in config_fields.BITS:
      _check(type(value) in (int, str), field, value, "an integer or a string")
    elif kind is float:
      _check(type(value) in (int, float), field, value, "a number")
    elif kind is tuple:
      _check(isinstance(value, list) and all(map(_is_element, value)), field, value,
             "a list of numbers, strings and lists of these")
    elif kind is not None:
      _check(type(value) is kind, field, value, f"of type {kind.__name__}")


def _is_element(value: Any) -> bool:
  """Whether a list in a config may hold a value."""
  values = value if isinstance(value, list) else [value]
  return all(isinstance(inner, (int, float, str)) for inner in values)


def _check_json(field: str, value: Any, depth: int) -> None:
  """Checks a value and all in it: its depth, its numbers and its strings."""
  if isinstance(value, (list, dict)):
    _check(depth < _MAX_DEPTH, field, value, _DEPTH)
    if isinstance(value, dict):
      for name, inner in value.items():  # Long names of many fields would take long.
        _check_json(f"{field}.{name[:_MAX_NAME]}", inner, depth + 1)
    else:
      for inner in value:
        _check_json(field, inner, depth + 1)
  elif isinstance(value, str):
    _check_unicode(field, value)
  elif isinstance(value, float):  # NaN is no JSON, but Python reads it.
    _check(math.isfinite(value), field, value,
           f"a finite number, and an integer has at most {_MAX_DIGITS} digits")


def _check_unicode(field: str, value: str) -> None:
  """Refuses halves of surrogate pairs, which JSON can name and no encoding holds."""
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise _refusal(field, value, "text without lone surrogates") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object. Readers of JSON disagree on which one counts of two equal names."""
  found = {}
  for name, value in pairs:
    _check_unicode("metadata", name)
    _check(name not in found, "metadata", name, "a name that occurs once in its object")
    found[name] = value
  return found


def _integer(digits: str) -> int | float:
  """Reads an integer. One of many digits, which would take long, is infinite."""
  return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


def _check(ok: bool, field: str, value: Any, allowed: str) -> None:
  if not ok:
    raise _refusal(field, value, allowed)


def _refusal(field: str, value: Any, allowed: str) -> ValueError:
  """The error for a field of foreign name and value."""
  return ValueError(
      f"packed network: {text.shortened(field)}={text.quoted(value)}: must be"
      f" {allowed}")
