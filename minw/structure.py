"""The structure of a network as a jaxpr with one equation for each layer of minw.

`trace` runs a Flax model once, without data, and binds each layer as an opaque
primitive. `evaluate` then executes that jaxpr equation by equation. It enters the calls
that nn.jit and nn.remat leave behind and unrolls the loops of nn.scan, so that its
callers see plain layers and plain operations, in the order of the computation. `fold`,
`pack` and `verify` all read networks through these two functions.
"""

import contextlib
import functools
from typing import Any, Callable, NamedTuple, Sequence

from flax import errors
import flax.linen as nn
import jax
from jax import core
from jax.extend import core as jex
from jax.interpreters import batching
import jax.numpy as jnp
import numpy as np

Apply = Callable[[Any, list[Any], str], Sequence[Any]]

# Names of the variables that a layer owns in training. Others in its scope are not
# read.
_TRAINED = ("batch_norm", "kernel", "step", "threshold_widths", "rprelu_beta",
            "rprelu_gamma", "rprelu_zeta")

# Primitives whose inner jaxpr `evaluate` enters.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
          "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")

# Module that defines the classes that a Flax transform makes.
_TRANSFORMS = "flax.linen.transforms"

# This context is part of the keys of JAX's caches. Without it, nn.jit would reuse the
# opaque layers of one trace in another trace or in training.
_tracing = jax.make_user_context(None)


class Call(NamedTuple):
  """A call of a layer. The parameter `index` of its equation is its position.

  The operands of the equation are the layer's input, its shortcut if it has one, and
  the leaves of its variables.

  Attributes:
    layer: The layer as an unbound module whose bits are resolved.
    path: Path of the layer, "block1/conv2".
    has_shortcut: Whether the second operand is a shortcut.
    variables: Tree of the layer's variables.
  """

  layer: nn.Module
  path: str
  has_shortcut: bool
  variables: Any

  def split(self, operands: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The input, the shortcut or None, and the variables among the operands."""
    x, *rest = operands
    shortcut = rest.pop(0) if self.has_shortcut else None
    return x, shortcut, jax.tree.unflatten(self.variables, rest)

  def check_exact(self) -> None:
    """Raises `ValueError` if the layer's class is a subclass of a layer of minw."""
    kind: Any = type(self.layer)
    if kind is not kind.layer_class:
      raise refusal(f"{self.path}: {kind.__name__} is a subclass of"
                    f" {kind.layer_class.__name__}, and may compute anything; only"
                    f" {kind.layer_class.__name__} itself packs")

  def name(self, where: str) -> str:
    """Path of the layer in an iteration of the loops around it: "block/conv[2]"."""
    return self.path + where


class Network(NamedTuple):
  """A traced network.

  Attributes:
    jaxpr: Its arguments are the leaves of the variables, then the images.
    calls: The layers' calls, by the `index` of their equations.
    output: Tree of the results.
  """

  jaxpr: jex.ClosedJaxpr
  calls: list[Call]
  output: Any


layer_p = jex.Primitive("minw_layer")
layer_p.multiple_results = True


@layer_p.def_abstract_eval
def _abstract(*operands, shapes, **_):
  del operands
  return [core.ShapedArray(shape, np.dtype(np.float32)) for shape in shapes]


def _refuse_vmap(operands, dims, *, path, **_):
  del operands, dims
  raise refusal(f"{path}: is inside jax.vmap or nn.vmap")


batching.primitive_batchers[layer_p] = _refuse_vmap


def refusal(problem: str) -> ValueError:
  """The error for a network that cannot be folded or packed."""
  return ValueError(f"this network cannot be packed: {problem}")


def layer(cls: type) -> type:
  """Decorates a layer class, whose layers become single equations in traced networks.

  The same holds for layers of its subclasses, which compute their hard networks
  themselves. But subclasses may compute anything. Therefore `pack` refuses them; see
  `Call.check_exact`.
  """
  cls.layer_class = cls
  return cls


def trace(model: nn.Module, variables: Any, images: Any, mode: str) -> Network:
  """Traces a network with opaque layers.

  Args:
    model: Called as model(images, 1.0, mode=mode).
    variables: Variables of the model, as arrays or `jax.ShapeDtypeStruct`s.
    images: Input of the model, as an array or a `jax.ShapeDtypeStruct`.
    mode: "hard", "mixed" or "fold". With "fold" the results are the output and the new
      collection "hard".

  Returns:
    The traced network.

  Raises:
    ValueError: The network cannot be traced; the message names the layer.
  """
  calls = []

  def bind(module, x, alpha=1.0, mode="hard", shortcut=None):
    if mode != wanted:
      raise refusal(f"{'/'.join(module.path)}: is called with mode={mode!r} where the"
                    f" network is called with mode={wanted!r}")
    del alpha
    return _bind(calls, module, mode, x, shortcut)

  def apply(variables, images):
    return model.apply(variables, images, 1.0, mode=wanted, **options)

  wanted = mode
  options: dict[str, Any] = dict(mutable=["hard"]) if mode == "fold" else {}
  try:
    with _intercept(bind), _tracing(object()):
      closed, shapes = jax.make_jaxpr(apply, return_shape=True)(variables, images)
  except ValueError as error:
    if "broadcasted variable" not in str(error):
      raise
    raise refusal(f"{calls[-1].path}: is inside nn.scan with variables that the"
                  " iterations share; give each its own by variable_axes") from error
  except (errors.FlaxError, NotImplementedError, jax.errors.JAXTypeError,
          jax.errors.JAXIndexError) as error:
    after = f"{calls[-1].path}: after it, " if calls else ""
    line = str(error).strip().split("\n")[0]
    raise refusal(f"{after}{type(error).__name__}: {line}") from error
  return Network(closed, calls, jax.tree.structure(shapes))


@contextlib.contextmanager
def _intercept(handle):
  """Replaces calls of layers by handle(layer, *args, **kwargs) inside the context."""
  # While a layer is handled, calls are left alone: its output's shape is computed by a
  # normal call.
  handling = False

  def interceptor(call, args, kwargs, context):
    nonlocal handling
    kind = type(context.module)
    if (handling or not hasattr(kind, "layer_class")
        or context.method_name != "__call__"
        # A class that a Flax transform made calls the original class.
        or kind.__module__ == _TRANSFORMS):
      return call(*args, **kwargs)
    handling = True
    try:
      return handle(context.module, *args, **kwargs)
    finally:
      handling = False

  try:
    with nn.intercept_methods(interceptor):
      yield
  finally:
    # Flax removes the interceptor inside an assert, which `python -O` skips.
    if not __debug__:
      stack = nn.module._global_interceptor_stack  # pylint: disable=protected-access
      if next(iter(stack), None) is interceptor:
        stack.pop()


def _bind(calls, module, mode, x, shortcut):
  """Adds the equation of a layer and, in mode "fold", its hard variables."""
  path = "/".join(module.path)
  variables = _own_variables(module, mode)
  if not jax.tree.leaves(variables):
    raise refusal(f"{path}: its variables are missing")
  unbound = module.clone(parent=None, name=None, bits=bits_of(module))
  hard = variables.get("hard") or _hard_shapes(unbound, variables, x, shortcut)
  try:
    shape = _shape_of_output(unbound, hard, x, shortcut)
  except (TypeError, ValueError) as error:
    raise refusal(f"{path}: {str(error).strip().split(chr(10))[0]}") from error
  leaves, tree = jax.tree.flatten(variables)
  calls.append(Call(unbound, path, shortcut is not None, tree))
  results = hard if mode == "fold" else {}
  out, *made = layer_p.bind(
      x, *([] if shortcut is None else [shortcut]), *leaves, index=len(calls) - 1,
      path=path, results=tuple(results),
      shapes=(shape, *(leaf.shape for leaf in results.values())))
  if results and not module.is_mutable_collection("hard"):
    raise refusal(f"{path}: is inside a transform of Flax that does not carry the"
                  " collection 'hard': add it to variable_axes, beside 'params'")
  for name, leaf in zip(results, made):
    module.put_variable("hard", name, leaf)
  return out


def _shape_of_output(layer, hard, x, shortcut):
  given = tuple(
      (name, jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)))
      for name, leaf in (hard | {"x": x} | _given(shortcut)).items())
  try:
    hash(layer)
  except TypeError:  # A field is a list, for example.
    return _compute_shape(layer, given)
  if type(layer) is not layer.layer_class:  # It may compute anything, at any time.
    return _compute_shape(layer, given)
  return _shape_computed_once(layer, given)


def _compute_shape(layer, given):
  def apply(x, shortcut=None, **hard):
    return layer.apply({"hard": hard}, x, 1.0, "hard", **_given(shortcut))

  return jax.eval_shape(apply, **dict(given)).shape


_shape_computed_once = functools.lru_cache(maxsize=1024)(_compute_shape)


def _hard_shapes(unbound, variables, x, shortcut):
  shapes = unbound.hard_shapes(variables["params"], x.shape, shortcut is not None)
  return {name: jax.ShapeDtypeStruct(shapes[name], np.float32)
          for name in sorted(shapes)}


def _own_variables(module, mode):
  scope = module.variables
  if mode == "hard":
    return {"hard": {name: leaf for name, leaf in scope.get("hard", {}).items()
                     if not isinstance(leaf, dict)}}
  kinds = ("params", "batch_stats")
  others = {name for kind in kinds for name in scope.get(kind, {})} - set(_TRAINED)
  if others and type(module) is not module.layer_class:
    raise refusal(f"{'/'.join(module.path)}: {type(module).__name__}, a subclass of"
                  f" {module.layer_class.__name__}, has variables of its own:"
                  f" {', '.join(sorted(others))}")
  return {kind: {name: leaf for name, leaf in scope.get(kind, {}).items()
                 if name in _TRAINED} for kind in kinds}


def bits_of(module: Any) -> Any:
  """The bits of a layer: a number, the name of a dtype, or None.

  If they are a function of the layer's path, it is evaluated.
  """
  bits: Any = module.bits
  if callable(bits):
    bits = bits("/".join(module.path))
  return bits


def _given(shortcut):
  return {} if shortcut is None else {"shortcut": shortcut}


def apply_layer(call: Call, operands: Sequence[Any], mode: str, **options: Any) -> Any:
  """Computes the output of a layer from the operands of its equation.

  Args:
    call: The call of the layer.
    operands: Input, shortcut if there is one, and leaves of the variables.
    mode: Mode of the layer.
    **options: Options of `nn.Module.apply`, such as mutable=.

  Returns:
    The result of `nn.Module.apply`.
  """
  x, shortcut, variables = call.split(operands)
  return call.layer.apply(variables, x, 1.0, mode, **_given(shortcut), **options)


def apply_equation(eqn: Any, given: Sequence[Any]) -> Sequence[Any]:
  """Computes the results of an equation that is not a layer."""
  results = eqn.primitive.bind(*given, **eqn.params)
  return results if eqn.primitive.multiple_results else [results]


def evaluate(
    closed: jex.ClosedJaxpr, args: Sequence[Any], apply: Apply, where: str = ""
) -> list[Any]:
  """Executes a jaxpr, entering calls and unrolling loops.

  Args:
    closed: The jaxpr.
    args: Arguments of the jaxpr, of any type that `apply` understands. Arguments that a
      loop runs over are indexed.
    apply: Function apply(equation, arguments, where) that returns the equation's
      results. `where` names the iterations of the loops around it: "[2]" or "[2][0]".
    where: Prefix of these names.

  Returns:
    The results of the jaxpr.

  Raises:
    ValueError: A loop would have to index or stack a tuple. `apply` may use tuples for
      values that cannot be taken apart.
  """
  jaxpr = closed.jaxpr
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args)))
  read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
  for eqn in jaxpr.eqns:
    given = [read(atom) for atom in eqn.invars]
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if eqn.primitive.name == "scan":
      results = _unrolled(eqn, given, apply, where)
    elif inner is not None and eqn.primitive.name in _CALLS:
      inner = inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ())
      results = evaluate(inner, given, apply, where)
    else:
      _check_no_layer(eqn)
      results = apply(eqn, given, where)
    env.update(zip(eqn.outvars, results))
  return [read(atom) for atom in jaxpr.outvars]


def _unrolled(eqn, given, apply, where):
  p = eqn.params
  if "num_consts" in p:
    consts, carry = p["num_consts"], p["num_carry"]
  else:  # Since JAX 0.11, a tree holds the constants, the carry and the scanned inputs.
    consts, carry, _ = map(len, p["ft_in"].unpack())
  fixed, state, over = (
      given[:consts], given[consts:consts + carry], given[consts + carry:])
  steps = range(p["length"])
  each = [None] * p["length"]
  for i in reversed(steps) if p["reverse"] else steps:
    parts = [_whole(eqn, x)[i] for x in over]
    results = evaluate(p["jaxpr"], [*fixed, *state, *parts], apply, f"{where}[{i}]")
    state, each[i] = results[:carry], results[carry:]
  return [*state, *(_stack([_whole(eqn, x) for x in column]) for column in zip(*each))]


def _whole(eqn, x):
  if isinstance(x, tuple):
    names = layers_in(eqn)
    raise refusal(f"{names[0] if names else 'a loop'}: is in a loop that takes"
                  " activations apart or stacks them; only its carry may hold them")
  return x


def _stack(column):
  if any(isinstance(x, core.Tracer) for x in column):
    return jnp.stack(column)
  return np.stack(column)


def _check_no_layer(eqn):
  names = layers_in(eqn)
  if names and eqn.primitive is not layer_p:
    raise refusal(f"{names[0]}: is inside a {eqn.primitive.name}")


def layers_in(eqn: Any) -> list[str]:
  """The paths of the layers in an equation and in the jaxprs inside it."""
  if eqn.primitive is layer_p:
    return [eqn.params["path"]]
  inner = [part for value in eqn.params.values()
           for part in (value if isinstance(value, (tuple, list)) else [value])]
  jaxprs = [getattr(part, "jaxpr", part) for part in inner]
  return [name for jaxpr in jaxprs for each in getattr(jaxpr, "eqns", ())
          for name in layers_in(each)]
