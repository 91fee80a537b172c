"""A run's packed network against the run, and what is found where it is changed."""

import json

import numpy as np
import pytest

from minw import errors
from minw import evaluate
from minw import infer
from minw import layers
from minw import pack
from minw import packed
from minw import verify
from minw.data import datasets
from minw.data import resident
from minw.kernels import native
from minw.workdir import checkpoint
from short_runs import run
from short_runs import tiny_config

BACKENDS = ["native", "xla"] if native.available() else ["xla"]


@pytest.fixture(scope="module", name="workdir")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("verify")
  run(tiny_config(), workdir)
  return str(workdir)


@pytest.fixture(scope="module", name="program")
def program_of(workdir):
  return pack.pack_workdir(workdir)


def test_metadata(workdir, program):
  config, saved, _ = checkpoint.read_run(workdir)
  wanted = json.loads(config.to_json())
  # Where the run was computed is nobody else's business.
  for name in ("cache_dir", "data_dir", "data_workers", "init_from", "teacher"):
    del wanted[name]
  assert program.metadata["config"] == wanted
  assert program.metadata["step"] == saved.step
  assert program.metadata["labels"] == tuple("0123456789")
  assert len(program.metadata["config_hash"]) == 64


def test_best_checkpoint(workdir):
  saved = checkpoint.read_run(workdir, "best").saved
  assert pack.pack_workdir(workdir, "best").metadata["step"] == saved.step


def test_accuracy_is_the_runs(workdir, program, tmp_path):
  packed.write(tmp_path / "net.minw", program)
  for split in ("test", "validation"):
    run_result = evaluate.evaluate_workdir(workdir, split)
    result = evaluate.evaluate_model(tmp_path / "net.minw", split)
    assert result["accuracy"] == run_result["accuracy"]
    assert result["loss"] == pytest.approx(run_result["loss"], rel=1e-6)


@pytest.mark.gpu
def test_nothing_differs(workdir, program, tmp_path, capsys):
  packed.write(tmp_path / "net.minw", program)
  assert verify.verify_workdir(workdir, str(tmp_path / "net.minw")) == 0
  first, second = capsys.readouterr().out.splitlines()
  assert "360 images (the test split of digits): the trained network, " in first
  assert second.endswith("of 360 labels of the hard network differ from those of"
                         " training (alpha = 1)")


def test_random_images_are_compared_without_data(
    workdir, program, tmp_path, capsys, monkeypatch):
  def no_images(data, split):
    raise errors.UsageError(f"config.data_dir: no {split} split")

  monkeypatch.setattr(resident.Resident, "source_images", no_images)
  packed.write(tmp_path / "net.minw", program)
  assert verify.verify_workdir(workdir, str(tmp_path / "net.minw")) == 0
  why, first, second = capsys.readouterr().out.splitlines()
  assert why == ("Random images are compared, because there are no data:"
                 " config.data_dir: no test split")
  assert "1024 images (random images): the trained network, " in first
  assert "of 1024 labels of the hard network differ" in second


def test_a_hard_network_that_is_not_the_trained_one_is_found(
    workdir, program, tmp_path, capsys, monkeypatch):
  packed.write(tmp_path / "net.minw", program)
  exact = layers.NormQuant.__call__

  def shifted(layer, x, alpha=1.0, mode="hard", shortcut=None):
    """In training something that the hard network lacks."""
    if mode == "mixed" and layer.name == "norm_conv2":
      x = x + 1.0
    return exact(layer, x, alpha, mode, shortcut)

  monkeypatch.setattr(layers.NormQuant, "__call__", shifted)
  assert verify.verify_workdir(workdir, str(tmp_path / "net.minw")) == 1
  line, = capsys.readouterr().out.splitlines()
  assert line.startswith("norm_conv2: ") and "by more than rounding; " in line
  assert "of 360 labels of the hard network differ from those of training" in line


def changed(program, index, **fields):
  ops = list(program.ops)
  ops[index] = ops[index]._replace(**fields)
  return program._replace(ops=tuple(ops))


def test_a_changed_weight_is_found(workdir, program, tmp_path, capsys):
  conv = program.ops[0]
  kernel = conv.kernel.copy()
  kernel[1, 1, 1, 0] *= -1
  packed.write(tmp_path / "net.minw", changed(program, 0, kernel=kernel))
  assert verify.verify_workdir(workdir, str(tmp_path / "net.minw")) == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == (f"reference: {conv.name} differs from the trained network on"
                      " equal inputs")
  for line, backend in zip(lines[1:], BACKENDS, strict=True):
    assert line.startswith(f"{backend}: {conv.name} differs first, at image 0, ")
    assert "where the trained network has" in line


def test_a_changed_threshold_is_found(workdir, program, tmp_path, capsys):
  """By one: only an accumulator exactly there tells."""
  images, _ = datasets.load("digits", "test", None)
  index, op = next((i, op) for i, op in enumerate(program.ops)
                   if isinstance(op, packed.Threshold))
  acc = infer.Network(packed.to_bytes(program), "reference", 1).values(images)[op.input]
  thresholds = op.thresholds.copy()
  hit = (acc == thresholds[0, 0]).any((0, 1, 2)) & ~op.falling
  channel = np.flatnonzero(hit)[0]
  thresholds[0, 0, channel] += 1
  packed.write(tmp_path / "net.minw", changed(program, index, thresholds=thresholds))
  assert verify.verify_workdir(workdir, str(tmp_path / "net.minw")) == 1
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(":")[0] for line in lines if "differs first" in line] == BACKENDS
  assert all(f"{op.name} differs" in line for line in lines)


def test_a_changed_logit_is_found(workdir, program, tmp_path, capsys):
  op = program.ops[-1]
  center = np.nextafter(op.center, np.float32(np.inf))
  packed.write(tmp_path / "net.minw", changed(program, -1, center=center))
  assert verify.verify_workdir(workdir, str(tmp_path / "net.minw")) == 1
  assert f"{op.name} differs" in capsys.readouterr().out


def test_command(command, workdir, program, tmp_path):
  out = tmp_path / "net.minw"
  done = command("minw.pack", f"--workdir={workdir}", f"--out={out}", "--verify")
  assert done.code == 0, done.err
  assert out.read_bytes() == packed.to_bytes(program)
  assert f"{out}: {out.stat().st_size / 2**20:.3f} MiB" in done.out
  assert "equal, layer by layer, on 360 images" in done.out


@pytest.mark.parametrize("arguments, message", [
    (("--workdir={tmp}", "--out=x.minw"), "there is no config.json"),
    (("--workdir={workdir}", "--out={tmp}/none/x.minw"), "cannot be written"),
    (("--workdir={workdir}",), "out"),
])
def test_command_refuses_in_one_line(command, workdir, tmp_path, arguments, message):
  arguments = [a.format(workdir=workdir, tmp=tmp_path) for a in arguments]
  done = command("minw.pack", *arguments)
  assert done.code == 2 and message in done.err
  assert "Traceback" not in done.err
