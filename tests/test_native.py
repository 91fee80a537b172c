"""The native library against the NumPy reference: equal integers, equal logits."""

import concurrent.futures
import functools
import os
import pathlib
import platform
import struct
import subprocess
import sys
import time

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from c_programs import CSRC
from c_programs import setup_flags
from c_programs import tool
from minw import packed
from minw.kernels import native
from minw.kernels import reference
import native_cases
from packed_files import mutants
from packed_files import with_checksum
from packed_networks import Builder
from packed_networks import images
from packed_networks import programs
from packed_networks import residual_and_dense
from packed_networks import seeds

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native library was not built")
ISAS = native.isas() if native.available() else []
HERE = pathlib.Path(__file__).parent / "native"
SANITIZED = int(os.environ.get("MINW_SANITIZED_MUTANTS", 1000))


@functools.lru_cache(maxsize=500)  # Each instruction set gets the same networks.
def expected(data, batch):
  program = packed.from_bytes(data)
  x = images(program, batch)
  return x, reference.run(program, x)


def check(program, batch=3):
  """All values, then the logits of the fused path, on one instruction set."""
  data = packed.to_bytes(program)
  network, (x, want) = native.load(data), expected(data, batch)
  have = network.values(x)
  for i, (a, b) in enumerate(zip(want, have, strict=True)):
    where = f"{network.isa}, value {i}, {network.layers()[i - 1]}"
    assert a.dtype == b.dtype and a.shape == b.shape, where
    np.testing.assert_array_equal(a, b, err_msg=where)
  np.testing.assert_array_equal(network.logits(x), want[-1].reshape(batch, -1))
  return network


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
  monkeypatch.setenv("MINW_ISA", request.param)
  return request.param


@pytest.mark.parametrize("activations", native_cases.BITS)
@pytest.mark.parametrize("weights", native_cases.BITS)
@pytest.mark.parametrize("channels", native_cases.CHANNELS)
def test_channels(isa, weights, activations, channels):
  assert check(native_cases.channels(weights, activations, channels)).isa == isa


@pytest.mark.parametrize("activations", (1, 2, 3))
@pytest.mark.parametrize("weights", (1, 2, 3))
def test_kernel_names(isa, weights, activations):
  """Kernels that depend on the bits name them, weights first."""
  b = Builder(np.random.default_rng(0), (6, 7, 3))
  b.conv(b.threshold(b.conv(0, 1, 64), activations), weights, 70)
  (_, kernel), = native.load(packed.to_bytes(b.end(3))).layers()[2:3]
  if isa == "amx":
    assert kernel == f"W{weights}A{activations} int8 tiles"
  elif isa == "vbmi" and 3 in (weights, activations):
    assert kernel == f"W{weights}A{activations} wide table lookup"
  elif 1 in (weights, activations) or weights == activations == 2:
    assert kernel.split()[0] == f"W{weights}A{activations}"
    assert kernel.endswith("table lookup" if isa == "avx2" else "popcount")
  else:
    assert kernel.split()[0] in ("int8", "int16")


def test_isas_of_this_cpu():
  """A file that does not compile must not leave its instruction set out unseen."""
  if not os.path.exists("/proc/cpuinfo"):
    pytest.skip("no list of the CPU's instructions")
  flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
  avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vpopcntdq",
            "avx512_vnni"}
  vbmi = avx512 | {"avx512vbmi"}
  needs = {"amx": vbmi | {"amx_tile", "amx_int8"}, "vbmi": vbmi, "avx512": avx512,
           "avx2": {"avx2"}}
  assert ISAS == [*(isa for isa, need in needs.items() if need <= flags),
                  *["neon"] * (platform.machine() == "aarch64"), "portable"]


@pytest.mark.skipif("amx" not in ISAS, reason="the CPU has no int8 tiles")
@pytest.mark.parametrize("seed", range(12))
def test_tiles(monkeypatch, seed):
  monkeypatch.setenv("MINW_ISA", "amx")
  rng = np.random.default_rng(seed)
  bits, weights, outputs = (
      int(rng.choice(choices)) for choices in ((1, 2, 3), (1, 2, 3), (31, 32, 33, 70)))
  kernels = check_all_geometry(rng, bits, weights, outputs)
  assert sum(k.endswith("int8 tiles") for k in kernels) == 2, kernels


@pytest.mark.skipif("vbmi" not in ISAS, reason="the CPU has no lookups of 64 bytes")
@pytest.mark.parametrize("seed, outputs", [
    pytest.param(seed, outputs, marks=() if seed in (0, 2, 5) else pytest.mark.slow)
    for seed, outputs in enumerate((1, 64, 65, 128, 190, 256, 300))])
@pytest.mark.parametrize("bits, weights", ((3, 1), (3, 2), (3, 3), (1, 3), (2, 3)))
def test_wide_tables(monkeypatch, bits, weights, seed, outputs):
  """Groups of output channels have one to four vectors of 64."""
  monkeypatch.setenv("MINW_ISA", "vbmi")
  kernels = check_all_geometry(np.random.default_rng(seed), bits, weights, outputs)
  assert f"W{weights}A{bits} wide table lookup" in kernels


@pytest.mark.skipif("vbmi" not in ISAS, reason="the CPU has no lookups of 64 bytes")
@pytest.mark.parametrize("size", ((9, 22), (8, 13), (5, 4)), ids=range(3))
def test_channels_select_wide_tables(monkeypatch, size):
  """Chunks have three, two and one vectors of pixels. Sums are the largest ones.

  A window has 550 steps, which are more than a block, and 3200 weights, the magnitude
  of which is 4. All signs of an output channel agree with those of its inputs, or none.
  """
  monkeypatch.setenv("MINW_ISA", "vbmi")
  b = Builder(np.random.default_rng(0), (*size, 3))
  x = b.threshold(b.conv(0, 1, 128, (1, 1), pads=(0, 0, 0, 0)), 1)
  x = b.conv(x, 3, 34, (5, 5), pads=(2, 2, 2, 2))
  program = b.end(b.threshold(x, 1))
  image = images(program, 1)[:, :1, :1].repeat(size[0], 1).repeat(size[1], 2)
  signs = reference.run(program, image)[2][0, 0, 0]  # Those of all pixels.
  conv = program.ops[2]
  kernel = np.zeros_like(conv.kernel) + 3 * np.int8([1, -1] * 17)[:, None, None, None]
  ops = (*program.ops[:2], conv._replace(kernel=kernel * signs), *program.ops[3:])
  network = native.load(packed.to_bytes(program._replace(ops=ops)))
  assert network.layers()[2][1] == "W3A1 wide table lookup"
  rows, columns = (np.minimum(np.arange(n), 2) + np.minimum(np.arange(n)[::-1], 2) + 1
                   for n in size)  # Taps inside the map.
  want = 4 * 128 * np.outer(rows, columns)[..., None] * np.int32([1, -1] * 17)
  np.testing.assert_array_equal(network.values(image)[3][0], want)


def check_all_geometry(rng, bits, weights, outputs) -> list[str]:
  """Checks strides, dilation, borders, pooling and several images.

  Args:
    rng: Generator of the network.
    bits: Bits of the codes that the second convolution reads.
    weights: Bits of its weights.
    outputs: Its output channels.

  Returns:
    The names of the kernels.
  """
  draw = lambda *choices: int(rng.choice(choices))
  b = Builder(rng, (draw(29, 36), draw(37, 50), draw(1, 3, 4)))
  x = b.conv(0, draw(1, 2, 3), draw(15, 40), (3, 2), pads=(1, 0, 2, 1))
  if draw(0, 1):
    x = b.add(packed.Pool("pool", x, "max", (2, draw(1, 2)), (2, draw(1, 2))))
  x = b.threshold(x, bits)
  window = draw(1, 2, 3), draw(1, 3, 5)
  pads = tuple(rng.integers(0, 3, 4).tolist())
  pad = draw(-1, 1) if bits == 1 else draw(-1, 0, 1)
  x = b.conv(x, weights, outputs, window, (draw(1, 2), draw(1, 2, 3)),
             pads, pad, dilation=(draw(1, 2), draw(1, 2)))
  program = b.end(b.threshold(x, bits))
  network = check(program)
  x = images(program, 17)
  want = reference.run(program, x)[-1].reshape(17, -1)
  for batch in (2, 5, 17):
    for threads in (1, 3):
      have = network.logits(x[:batch], threads=threads)
      np.testing.assert_array_equal(have, want[:batch])
  return [kernel for _, kernel in network.layers()]


@pytest.mark.parametrize("size", range(1, 12))
def test_kernel_sizes(isa, size):
  check(native_cases.kernel_size(size))


@pytest.mark.parametrize("pad", native_cases.PADS)
@pytest.mark.parametrize("bits", native_cases.BITS)
def test_borders(isa, bits, pad):
  if abs(pad) > packed.max_code(bits):
    pytest.skip("no such code")
  check(native_cases.borders(bits, pad))
  check(native_cases.thin_borders(bits, pad))


@pytest.mark.parametrize("activations", native_cases.BITS)
@pytest.mark.parametrize("weights", native_cases.BITS)
@pytest.mark.parametrize("groups, inputs, outputs", native_cases.GROUPS)
def test_groups(isa, weights, activations, groups, inputs, outputs):
  check(native_cases.groups(weights, activations, groups, inputs, outputs))


@pytest.mark.parametrize("pad", (-1, 0, 1))
@pytest.mark.parametrize("activations", native_cases.BITS)
@pytest.mark.parametrize("weights", native_cases.BITS)
def test_dilation(isa, weights, activations, pad):
  check(native_cases.dilation(weights, activations, pad))


def test_large_sums_of_groups(isa):
  check(native_cases.large_sums_of_groups())


def test_large_sums_need_wide_thresholds(isa):
  check(native_cases.large_sums())


@pytest.mark.parametrize("activations", native_cases.BITS)
@pytest.mark.parametrize("weights", native_cases.BITS)
@pytest.mark.parametrize("sign", (-1, 1))
def test_largest_counts(isa, weights, activations, sign):
  check(native_cases.largest_counts(weights, activations, sign), 1)


def test_more_steps_than_small_counters_hold(isa):
  check(native_cases.many_steps(), 1)


def test_more_inputs_than_lookups_gather(isa):
  check(native_cases.many_inputs(), 1)


@pytest.mark.parametrize("bits", native_cases.BITS)
def test_every_operation(isa, bits):
  check(residual_and_dense(bits))


def test_image_is_read_by_other_operations(isa):
  check(native_cases.image_operations())


@pytest.mark.parametrize("inputs", (64, 128))
@pytest.mark.parametrize("activations", native_cases.BITS)
@pytest.mark.parametrize("weights", native_cases.BITS)
def test_wide_groups(isa, weights, activations, inputs):
  check(native_cases.wide_groups(weights, activations, inputs))


@pytest.mark.parametrize("activations", native_cases.BITS)
@pytest.mark.parametrize("weights", native_cases.BITS)
def test_pools(isa, weights, activations):
  network = check(native_cases.pools(weights, activations, *native_cases.POOLS[0]))
  if isa != "amx":  # Tiles do not pool rows one by one.
    assert [kernel for name, kernel in network.layers() if name == "max"] == 2 * [
        "in the pass of its convolution"]


@pytest.mark.parametrize("case", native_cases.POOLS)
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_shapes_of_pools(isa, case, threads):
  program = native_cases.pools(1, 2, *case)
  network = check(program)
  x, want = expected(packed.to_bytes(program), 7)
  for batch in (1, 2, 7):
    np.testing.assert_array_equal(network.logits(x[:batch], threads=threads),
                                  want[-1].reshape(7, -1)[:batch])


@pytest.mark.parametrize("case", native_cases.POOLS)
def test_pools_of_floats(isa, case):
  program = native_cases.pools("float32", 1, *case)
  network = native.load(packed.to_bytes(program))
  x = images(program, 3)
  values = network.values(x)
  _, window, (vertical, horizontal), (top, bottom, left, right) = case
  padded = np.pad(values[1], ((0, 0), (top, bottom), (left, right), (0, 0)),
                  constant_values=-np.inf)
  windows = np.lib.stride_tricks.sliding_window_view(padded, window, (1, 2))
  np.testing.assert_array_equal(
      values[2], windows[:, ::vertical, ::horizontal].max((-2, -1)))
  for threads in (1, 3):
    np.testing.assert_array_equal(
        network.logits(x, threads=threads), values[-1].reshape(3, -1))


@hypothesis.given(programs(), st.integers(1, 4), st.sampled_from(ISAS or ["none"]))
@hypothesis.settings(max_examples=120, deadline=None)
def test_random_networks(program, batch, isa):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MINW_ISA", isa)
    check(program, batch)


@pytest.mark.parametrize("form", native_cases.FLOATS)
def test_floats(isa, form):
  """Each operation, given what the library gave the one before it."""
  program, values = native_cases.floats(form)
  network = native.load(packed.to_bytes(program))
  x = images(program, 3)
  have = network.values(x)
  for i, (op, kind) in enumerate(zip(program.ops, values[1:])):
    given = packed.inputs(op)
    want = reference.run_op(
        op, [have[j] for j in given], [values[j] for j in given], kind)
    tolerance = 1e-5 * np.abs(want).max() if isinstance(
        op, (packed.Conv, packed.Pool)) and kind.kind == "FLOAT" else 0
    assert np.abs(have[i + 1] - want).max() <= tolerance, op
  np.testing.assert_array_equal(network.logits(x), have[-1].reshape(3, -1))


@pytest.mark.parametrize("pool", (2, 3))
@pytest.mark.parametrize("case", native_cases.STEMS, ids=str)
def test_fast_convolutions_of_images(isa, case, pool):
  """Sums of the reference are in double precision."""
  program = native_cases.stem("float32", *case, pool)
  network = native.load(packed.to_bytes(program))
  assert network.layers()[0] == ("conv", "float32 Winograd")
  x = images(program, 3)
  pixels, sums, *_, logits = network.values(x)
  image, kind = packed.infer_values(program)[:2]
  want = reference.run_op(program.ops[0], [pixels], [image], kind)
  assert np.abs(sums - want).max() <= 3e-6 * np.abs(want).max()
  for batch, threads in ((3, 1), (2, 3), (1, 2)):  # In passes with the pooling.
    np.testing.assert_array_equal(
        network.logits(x[:batch], threads=threads), logits.reshape(3, -1)[:batch])


def test_floats_are_the_same_on_all_isas(monkeypatch):
  b = Builder(np.random.default_rng(0), (8, 7, 3))
  cases = [b.end(b.norm(b.conv(0, "float32", 20), "float32"), "float16")]
  cases += [native_cases.stem("float32", *case, 3) for case in native_cases.STEMS]
  for program in cases:
    every = []
    for isa in ISAS:
      monkeypatch.setenv("MINW_ISA", isa)
      network = native.load(packed.to_bytes(program))
      every.append(network.values(images(program, 5))[1])
    for other in every[1:]:
      np.testing.assert_array_equal(every[0], other)


@pytest.mark.parametrize("threads", range(1, 5))
def test_batches_and_threads(isa, threads):
  program = native_cases.small()
  network = native.load(packed.to_bytes(program))
  want = reference.logits(program, images(program, 40))
  for batch in (*range(18), 40):
    have = network.logits(images(program, 40)[:batch], threads=threads)
    np.testing.assert_array_equal(have, want[:batch])


@pytest.mark.parametrize("change", [
    lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),
    lambda x: np.repeat(x, 2, axis=2)[:, :, ::2], np.asfortranarray],
    ids=["read-only", "strided", "Fortran"])
def test_layouts_of_images(change):
  program = native_cases.small()
  x = images(program, 3)
  np.testing.assert_array_equal(
      native.load(packed.to_bytes(program)).logits(change(x)),
      reference.logits(program, x))


def test_many_callers():
  program = native_cases.small()
  network = native.load(packed.to_bytes(program))
  x = images(program, 33)
  want = network.logits(x)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for have in pool.map(lambda i: network.logits(x, threads=i % 4), range(200)):
      np.testing.assert_array_equal(have, want)


# Forks while four threads are in calls, with helpers of their own. A child that waits
# for a lock that a thread held which it does not have would wait forever.
FORKS = """
import os, signal, sys, threading
import numpy as np
from minw import packed
from minw.kernels import native

network = native.load(open(sys.argv[1], "rb").read())
images = np.load(sys.argv[2])
want = network.logits(images)
stop = threading.Event()

def work():
  while not stop.is_set():
    network.logits(images, threads=3)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
  thread.start()
codes = []
for _ in range(int(sys.argv[3])):
  child = os.fork()
  if not child:
    signal.alarm(20)
    os._exit(int((network.logits(images, threads=3) != want).any()))
  codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
for thread in threads:
  thread.join()
failed = sum(map(bool, codes))
sys.exit(f"{failed} of {len(codes)} children failed" if failed else 0)
"""


@pytest.mark.parametrize("forks", (40, pytest.param(2000, marks=pytest.mark.slow)))
def test_forks(tmp_path, forks):
  program = native_cases.small()
  (tmp_path / "small.minw").write_bytes(packed.to_bytes(program))
  np.save(tmp_path / "images.npy", images(program, 33))
  subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS,
                  tmp_path / "small.minw", tmp_path / "images.npy", str(forks)],
                  check=True)


@pytest.mark.parametrize("threads", (2, 3, 8))
def test_threads_share_layers(isa, threads):
  program = native_cases.large()
  network, x = native.load(packed.to_bytes(program)), images(program, 7)
  want = reference.run(program, x)[-1].reshape(7, -1)
  for batch in (1, 2, 7):
    for _ in range(20):
      have = network.logits(x[:batch], threads=threads)
      np.testing.assert_array_equal(have, want[:batch])


def test_helpers_sleep_between_calls():
  """Helpers spin for microseconds, and then cost no time of the CPU."""
  program = native_cases.large()
  network, x = native.load(packed.to_bytes(program)), images(program, 1)
  for _ in range(10):
    network.logits(x, threads=4)
  time.sleep(0.1)
  begin = time.process_time()
  time.sleep(1)
  assert time.process_time() - begin < 0.2


def test_names_and_kernels(isa):
  b = Builder(np.random.default_rng(0), (4, 4, 3))
  x = b.conv(0, 1, 128)
  for weights, activations in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 3)):
    x = b.conv(b.threshold(x, activations), weights, 128)
  program = b.end(b.threshold(x, 1))
  layers = native.load(packed.to_bytes(program)).layers()
  assert [name for name, _ in layers] == [op.name for op in program.ops]
  assert layers[-1][1] == "plain loops"
  assert {kernel for name, kernel in layers if name == "norm"} == {
      "in the pass of its convolution"}
  kernels = [kernel for name, kernel in layers if name == "conv"]
  tables = isa in ("amx", "vbmi")  # The maps are too small for tiles.
  dots = tables or isa in ("avx512", "avx2")
  assert kernels[0] == ("int8 dot products" if dots else "int16 sums")
  for kernel in kernels[1:5]:
    assert "product" not in kernel
  assert kernels[5] == ("W3A3 wide table lookup" if tables else
                        "int8 dot products" if dots else "int16 products")


@pytest.mark.parametrize("size, window, stride, step", native_cases.IMAGES)
@pytest.mark.parametrize("channels", (1, 3, 4, 5))
def test_images(isa, size, window, stride, step, channels):
  """Layers that read images, at the extremes of pixels and offsets."""
  program = native_cases.image(size, window, stride, step, channels)
  check(program)
  network = native.load(packed.to_bytes(program))
  for fill in (0, 255):
    x = np.full((2, *network.shape), fill, np.uint8)
    want = reference.run(program, x)
    np.testing.assert_array_equal(network.values(x)[1], want[1])
    np.testing.assert_array_equal(network.logits(x), want[-1].reshape(2, -1))


@pytest.mark.skipif(not ISAS or ISAS[0] in ("portable", "neon"),
                    reason="the CPU has no kernels to choose from")
@pytest.mark.parametrize("activations", (1, 2, 3))
@pytest.mark.parametrize("weights", (1, 2, 3))
def test_choice(monkeypatch, weights, activations):
  """Without MINW_ISA, the kernel is one of some instruction set; sums are the same."""
  monkeypatch.delenv("MINW_ISA", raising=False)
  b = Builder(np.random.default_rng(0), (9, 8, 3))
  x = b.threshold(b.conv(0, weights, 64), activations)
  program = b.end(b.threshold(b.conv(x, weights, 70), 1))
  kernel = lambda: native.load(packed.to_bytes(program)).layers()[2][1]
  chosen = kernel()
  assert check(program).layers()[2][1] == chosen  # Measured once in a process.
  every = set()
  for isa in ISAS:
    monkeypatch.setenv("MINW_ISA", isa)
    every.add(kernel())
  assert chosen in every


def test_profile(isa):
  """Each pass has a time, at its first operation; together they take no longer."""
  b = Builder(np.random.default_rng(0), (24, 24, 3))
  x = b.threshold(b.conv(0, 1, 64), 1)
  x = b.add(packed.Pool("pool", b.conv(x, 1, 64), "max", (2, 2), (2, 2)))
  program = b.end(b.threshold(x, 1))
  network, x = native.load(packed.to_bytes(program)), images(program, 40)
  for threads in (1, 3):
    begin = time.perf_counter()
    seconds = network.profile(x, threads)
    total = time.perf_counter() - begin
    # The convolutions' thresholds and the pooling are in their passes.
    assert [s > 0 for s in seconds] == [True, False, True, False, False, True, True]
    assert [k != "in the pass of its convolution" for _, k in network.layers()] == [
        s > 0 for s in seconds]
    assert sum(seconds) < total
  with pytest.raises(ValueError, match="must be uint8"):
    network.profile(x[:, 1:])


@pytest.mark.parametrize("activations", (1, 2, 3))
@pytest.mark.parametrize("weights", (1, 2, 3))
@pytest.mark.parametrize("outputs", (70, 96))
def test_peak_counts_products(isa, weights, activations, outputs):
  """A step's products are those of a tile: its pixels, channels and inputs."""
  b = Builder(np.random.default_rng(0), (9, 8, 3))
  x = b.threshold(b.conv(0, 1, 64), activations)
  program = b.end(b.threshold(b.conv(x, weights, outputs), 1))
  network = native.load(packed.to_bytes(program))
  kernel = network.layers()[2][1]
  vector = {"amx": 64, "vbmi": 64, "avx512": 64, "avx2": 32}.get(isa, 16)  # Bytes.
  if kernel.endswith("tiles"):
    step = 2 * 16 * 2 * 16 * 64
  elif kernel.endswith("dot products"):
    pixels = {64: 6, 32: 4}[vector]
    step = pixels * 2 * vector // 4 * 4
  elif kernel.endswith("popcount"):
    one_and_two = weights + activations == 3
    pixels = {64: (4, 6), 32: (2, 3), 16: (2, 2)}[vector][one_and_two]
    inputs = 64 if weights == activations == 1 else 32
    channels = vector // 4 * (1 if vector == 64 and outputs == 70 else 2)
    step = pixels * inputs * channels
  else:
    step = 0
  assert network.peak(2, 7) == 7 * step
  assert network.peak(1, 7) == 0  # Thresholds have no products.



def test_unknown_isa(monkeypatch):
  monkeypatch.setenv("MINW_ISA", "mmx")
  with pytest.raises(ValueError, match="MINW_ISA=mmx .*these do: .*portable"):
    native.load(packed.to_bytes(native_cases.small()))


def test_images_of_another_shape():
  network = native.load(packed.to_bytes(native_cases.small()))
  for wrong in (np.zeros((1, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8),
                np.zeros((1, 8, 8, 4), np.uint8)):
    with pytest.raises(ValueError, match="must be uint8"):
      network.logits(wrong)


def repaired(data):
  """A damaged file with the size and the checksum that fit."""
  return with_checksum(data[:16] + struct.pack("<Q", len(data)) + data[24:])


@pytest.mark.parametrize("size", (0, 7, 31, 32, 33, 100, -1))
def test_truncated(size):
  data = packed.to_bytes(native_cases.small())[:size]
  for damaged in (data, repaired(data) if len(data) >= 32 else data):
    with pytest.raises(ValueError, match="packed network"):
      native.load(damaged)


def test_wrong_checksum_and_version():
  data = packed.to_bytes(native_cases.small())
  with pytest.raises(ValueError, match="checksum"):
    native.load(data[:60] + b"?" + data[61:])
  with pytest.raises(ValueError, match="version 3"):
    native.load(data[:8] + b"\3" + data[9:])


@pytest.mark.parametrize("fields, message", (
    ((0, 5, 3), "number of groups 0"),
    ((4, 5, 3), "4 groups of 1 input channels, but its input has 6"),
    ((2**32 - 1, 5, 3), "number of groups 4294967295"),
    ((6, 0, 3), "dilation 0"), ((6, 5, 65), "dilation 65"),
    ((6, 2**31, 3), "dilation 2147483648"),
    ((6, 7, 3), "larger than the padded input")))
def test_groups_and_dilation_that_do_not_fit(fields, message):
  b = Builder(np.random.default_rng(0), (11, 7, 6))
  x = b.conv(0, 2, 12, pads=(1, 1, 0, 0), groups=6, dilation=(5, 3))
  data = packed.to_bytes(b.end(b.threshold(x, 1)))
  native.load(data)
  valid = struct.pack("<3I", 6, 5, 3)
  assert data.count(valid) == 1
  bad = repaired(data.replace(valid, struct.pack("<3I", *fields)))
  with pytest.raises(ValueError, match=message):
    native.load(bad)
  with pytest.raises(ValueError, match="packed network"):
    packed.from_bytes(bad)


def test_outputs_that_are_no_groups():
  b = Builder(np.random.default_rng(0), (3, 3, 2))
  data = packed.to_bytes(b.end(b.conv(0, 1, 6, (1, 1), pads=(0,) * 4, groups=2), 1))
  sizes = struct.pack("<4I", 1, 1, 1, 6)
  assert data.count(sizes) == 1
  bad = repaired(data.replace(sizes, struct.pack("<4I", 1, 1, 1, 5)))
  with pytest.raises(ValueError, match="5 output channels in 2 groups"):
    native.load(bad)
  with pytest.raises(ValueError, match="5 output channels in 2 groups"):
    packed.from_bytes(bad)


@hypothesis.given(programs(), st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_damaged_files_are_refused_as_the_reader_does(program, data):
  bad = bytearray(packed.to_bytes(program))
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(24, len(bad) - 1))
    bad[at] = data.draw(st.sampled_from((0, 1, 127, 128, 255, bad[at] ^ 1)))
  bad = repaired(bytes(bad))
  try:
    network = native.load(bad)
  except ValueError:
    return
  try:
    program = packed.from_bytes(bad)
  except ValueError:
    return  # Such as of metadata, which the library does not read.
  if max(np.prod(v.shape) for v in packed.infer_values(program)) < 10**5:
    x = images(program, 1)
    np.testing.assert_array_equal(network.logits(x), reference.logits(program, x))


def xla_call(program, **options):
  try:
    return jax.jit(native.ffi_logits(packed.to_bytes(program), **options))
  except RuntimeError as error:
    pytest.skip(str(error))  # Built without jaxlib's headers.


def test_xla_call():
  program = native_cases.small()
  logits = xla_call(program, threads=2)
  x = images(program, 6)
  want = reference.logits(program, x)
  np.testing.assert_array_equal(logits(x), want)
  np.testing.assert_array_equal(logits(x[0]), want[0])
  np.testing.assert_array_equal(jax.vmap(logits)(x), want)
  with pytest.raises(ValueError, match="must be uint8"):
    logits(x[:, 1:])


def test_xla_calls_of_many_networks():
  """More than are kept; each is read again from its operand."""
  calls = []
  for seed in range(20):
    b = Builder(np.random.default_rng(seed), (2, 2, 1))
    program = b.end(0)
    x = images(program, 2)
    calls.append((xla_call(program), x, reference.logits(program, x)))
  for call, x, want in calls + calls:
    np.testing.assert_array_equal(call(x), want)


def test_c_program(tmp_path):
  compiler = tool("cc", "gcc")
  program = native_cases.small()
  x = images(program, 5)
  (tmp_path / "net.minw").write_bytes(packed.to_bytes(program))
  (tmp_path / "images").write_bytes(x.tobytes())
  library = CSRC.parent / "libminw.so"
  subprocess.run(
      [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}",
       str(HERE / "example.c"), str(library), f"-Wl,-rpath,{library.parent}",
       "-o", str(tmp_path / "example")], check=True)
  run = lambda *arguments: subprocess.run(
      [tmp_path / "example", *arguments], capture_output=True, text=True, cwd=tmp_path)
  result = run("net.minw", "images")
  assert result.returncode == 0, result.stderr
  labels = reference.logits(program, x).argmax(-1)
  assert result.stdout.split() == [str(label) for label in labels]
  result = run("images", "images")
  assert result.returncode == 1 and "not a packed network" in result.stderr


SOURCES = sorted(set(CSRC.glob("*.cc")) - {CSRC / "ffi.cc"})


def build(compiler, folder, flags, program, x86):
  """Compiles the library and a C++ program into one executable."""
  objects = []
  for path in (*SOURCES, HERE / program):
    isa = setup_flags()[path.stem] if x86 and path.stem in setup_flags() else []
    objects.append(str(folder / f"{path.stem}.o"))
    subprocess.run([compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror",
                    "-Wno-psabi", "-ffp-contract=off", *flags, *isa, f"-I{CSRC}", "-c",
                    str(path), "-o", objects[-1]], check=True)
  subprocess.run([compiler, *flags, *objects, "-pthread", "-o", str(folder / "run")],
                 check=True)
  return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ("address,undefined", "thread"))
def test_sanitizers(tmp_path, sanitizer):
  """Damaged networks, loaded and run by several threads under sanitizers."""
  compiler = tool("c++", "g++")
  flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
  if sanitizer != "thread":  # These two triple the time of compilation.
    flags.append("-fno-sanitize=object-size,pointer-overflow")
  run = build(compiler, tmp_path, flags, "fuzz.cc", platform.machine() == "x86_64")
  good, path = [*seeds(), packed.to_bytes(native_cases.large())], tmp_path / "networks"
  count = SANITIZED // 5 if sanitizer == "thread" else SANITIZED
  with open(path, "wb") as file:
    for data in (*good, *mutants(good, 2, count)):
      file.write(struct.pack("<I", len(data)) + data)
  for isa in ISAS:
    result = subprocess.run([run, "3", path], capture_output=True, text=True,
                            env=os.environ | {"MINW_ISA": isa})
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > len(good)


@pytest.mark.slow
def test_arm(tmp_path):
  """The kernels for NEON, cross-compiled and emulated, as the portable ones."""
  compiler = tool("aarch64-linux-gnu-g++")
  emulator = tool("qemu-aarch64", "qemu-aarch64-static")
  run = build(compiler, tmp_path, ["-static"], "compare.cc", x86=False)
  networks = [*seeds(), *(packed.to_bytes(native_cases.pools(1, 2, *case))
                          for case in native_cases.POOLS)]
  files = [tmp_path / f"{i}.minw" for i in range(len(networks))]
  for path, data in zip(files, networks):
    path.write_bytes(data)
  result = subprocess.run([emulator, run, "portable", "neon", *files],
                          capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
