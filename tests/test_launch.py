"""launch/: several processes on one machine, Slurm, TPU VMs, JobSet."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jobsets import check_jobset
from launchers import LAUNCH
from launchers import RECORD
from launchers import ROOT
from launchers import calls
from launchers import make_stub
from launchers import shellcheck

# --- One run on several processes of this machine.

STAND_IN = """
import os, signal, sys, time
flags = dict(part.lstrip("-").partition("=")[::2] for part in sys.argv[1:])
i = flags["process_id"]

def saved(*_):
  print("saved", flush=True)
  sys.exit(75)

if flags["mode"] != "deaf":
  signal.signal(signal.SIGTERM, saved)
else:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(" ".join(sys.argv[1:]), flush=True)
if flags["mode"] == "quick" or flags["mode"] == "mixed" and i == "0":
  sys.stderr.write("no newline at the end")
  sys.exit(0)
if i == flags.get("bad"):
  time.sleep(0.5)  # The others have their handlers by then.
  if flags["code"] == "-9":
    os.kill(os.getpid(), signal.SIGKILL)
  sys.exit(int(flags["code"]))
print("ready", flush=True)
time.sleep(60)
"""


def start_local(folder, *arguments, processes=2):
  (folder / "stand_in.py").write_text(STAND_IN)
  return subprocess.Popen(
      [sys.executable, LAUNCH / "local_multiprocess.py", f"--processes={processes}",
       "--module=stand_in", "--grace=1", "--", *arguments], text=True,
      env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_local_processes_are_told_of_each_other(tmp_path):
  process = start_local(tmp_path, "--mode=quick", "--workdir=a b", processes=3)
  lines = sorted(process.communicate(timeout=60)[0].splitlines())
  assert process.returncode == 0
  assert len(lines) == 6
  port = re.search(r"--coordinator=localhost:(\d+)", lines[0])[1]
  for i in range(3):
    assert lines[2 * i:2 * i + 2] == [
        f"[{i}] --mode=quick --workdir=a b --distributed --coordinator=localhost:{port}"
        f" --num_processes=3 --process_id={i}", f"[{i}] no newline at the end"]


@pytest.mark.parametrize("mode, code, expected", [
    ("slow", -9, 137), ("deaf", 3, 3),
    *(pytest.param("slow", code, code, marks=pytest.mark.slow) for code in (7, 75))])
def test_one_that_fails_ends_all(tmp_path, mode, code, expected):
  process = start_local(tmp_path, f"--mode={mode}", "--bad=1", f"--code={code}",
                        processes=3)
  begun = time.monotonic()
  output = process.communicate(timeout=60)[0]
  assert process.returncode == expected
  assert time.monotonic() - begun < 20  # They would sleep for a minute.
  assert output.count("saved") == (0 if mode == "deaf" else 2)
  assert ("killed" in output) == (mode == "deaf")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(tmp_path, number):
  process = start_local(tmp_path, "--mode=slow")
  wait_for_lines(process, "ready", 2)
  process.send_signal(number)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 75
  assert output.count("saved") == 2


def test_preempted_although_one_had_ended(tmp_path):
  process = start_local(tmp_path, "--mode=mixed")
  wait_for_lines(process, "ready", 1)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75


def wait_for_lines(process, text, count):
  """Reads until `text` came `count` times."""
  while count:
    line = process.stdout.readline()
    assert line, f"it ended before {text!r}"
    count -= text in line


@pytest.mark.parametrize("arguments, message", [
    (["--processes=2"], "arguments"),
    (["--processes=0", "--", "--config=x"], "processes"),
    (["--process=2", "--", "--config=x"], "process"),
])
def test_local_bad_input(command, arguments, message):
  code, _, err = command("local_multiprocess", *arguments)
  assert code == 2 and err.startswith("error: ") and message in err
  assert err.count("\n") == 1


# --- Shell.

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_shellcheck():
  assert {path.name for path in SCRIPTS} == {
      "accelerator.sh", "slurm.sbatch", "tpu_vm.sh"}
  shellcheck(*SCRIPTS)


@pytest.mark.parametrize(
    "path", [*SCRIPTS, LAUNCH / "jobset.yaml"], ids=lambda path: path.name)
def test_each_states_what_it_was_tried_on(path):
  head = path.read_text().split("\nset -")[0].lower()
  assert "tried" in head and "TRIED_ON" not in path.read_text()


@pytest.mark.parametrize("code, requeued", [(0, False), (75, True), (3, False)])
def test_slurm_script(tmp_path, code, requeued):
  make_stub(tmp_path / "srun", RECORD.format(folder=tmp_path) + f"exit {code}")
  make_stub(tmp_path / "scontrol", RECORD.format(folder=tmp_path))
  done = subprocess.run(
      ["bash", LAUNCH / "slurm.sbatch", "--config=x.py", "--workdir=a b"],
      env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}",
                        "SLURM_JOB_ID": "12"})
  assert done.returncode == code
  run, *more = calls(tmp_path)
  assert run[-5:] == ["-m", "minw.main", "--config=x.py", "--workdir=a b",
                      "--distributed"]
  assert more == [["requeue", "12"]] * requeued


# --- Checks and measurements of an accelerator, with a stand-in for Python.


def run_accelerator(folder, *arguments, stub=""):
  make_stub(folder / "python", RECORD.format(folder=folder) + stub)
  return subprocess.run(
      ["bash", LAUNCH / "accelerator.sh", *arguments], text=True, capture_output=True,
      timeout=60, env=os.environ | {"PYTHON": str(folder / "python"),
                                    "SECONDS_EACH": "5"})


def test_accelerator_runs_all_stages(tmp_path):
  out = tmp_path / "a b"
  done = run_accelerator(tmp_path, out, stub='echo "$*"; [ "$2" != pytest ]')
  assert done.returncode == 1  # The tests failed, and the others ran nevertheless.
  tests, *benches = calls(tmp_path)
  assert tests == ["-m", "pytest", "-m", "gpu", "-n", "2", "-q"]
  fields = lambda call: dict(part.removeprefix("--").split("=", 1) for part in call[3:])
  names = [*6 * ["train"], "throughput", "inference"]
  assert [call[:3] for call in benches] == [
      ["-m", "minw.bench", name] for name in names]
  assert [(f["config"][-1], f["config.sum_dtype"], f["config.deterministic"])
          for f in map(fields, benches[:6])] == [
      (network, *of) for network in "DA" for of in (
          ("float32", "true"), ("float32", "false"), ("bfloat16", "true"))]
  records = [fields(call)["json"] for call in benches]
  assert len(set(records)) == 8
  for record in records:  # Beside it, there is what was printed.
    text = pathlib.Path(record).with_suffix(".txt")
    assert text.parent == out and record in text.read_text()


def test_accelerator_runs_one_stage(tmp_path):
  done = run_accelerator(tmp_path, tmp_path / "out", "inference", stub="exit 0")
  assert done.returncode == 0
  assert [call[2] for call in calls(tmp_path)] == ["inference"]


def test_accelerator_stops_what_takes_too_long(tmp_path):
  done = run_accelerator(tmp_path, tmp_path / "out", "throughput", stub="sleep 60")
  assert done.returncode == 1 and "throughput: stopped after 5 seconds" in done.stdout


@pytest.mark.parametrize("arguments, message", [
    ([], "no arguments"), (["out", "train", "speed"], "speed")])
def test_accelerator_bad_input(tmp_path, arguments, message):
  done = run_accelerator(
      tmp_path, *(tmp_path / x if x == "out" else x for x in arguments))
  assert done.returncode == 2 and done.stderr.startswith(f"error: {message}: must be")
  assert done.stderr.count("\n") == 1 and not calls(tmp_path)


# --- TPU VMs, with a stand-in for gcloud.

# Each call takes the next line of script.txt: STATE of a describe, or an exit code.
GCLOUD = RECORD + """
verb=$4
line=$(grep -n -m1 "^$verb " {folder}/script.txt | cut -d: -f1)
[ -n "$line" ] || exit 0
word=$(sed -n "${{line}}p" {folder}/script.txt | cut -d' ' -f2)
sed -i "${{line}}d" {folder}/script.txt
case $verb in
  describe) [ "$word" = NONE ] && exit 1; echo "$word" ;;
  *) exit "$word" ;;
esac
"""


def run_tpu(folder, script, *arguments, tar='cat > /dev/null; touch "$2"',
            **environment):
  """Exit code, standard error, and the calls of gcloud."""
  make_stub(folder / "gcloud", GCLOUD.format(folder=folder))
  make_stub(folder / "tar", tar)
  (folder / "script.txt").write_text("\n".join(script) + "\n")
  done = subprocess.run(
      ["bash", LAUNCH / "tpu_vm.sh", *arguments], text=True, capture_output=True,
      timeout=60, env=os.environ | {
          "PATH": f"{folder}:{os.environ['PATH']}", "ZONE": "us-east5-a",
          "TYPE": "v5litepod-16", "VERSION": "v2-alpha-tpuv5-lite", "WAIT": "0",
          "TMPDIR": str(folder), **environment})
  for call in calls(folder):
    assert call[:3] == ["compute", "tpus", "tpu-vm"]
    assert call[-2:] == ["--zone=us-east5-a", "--quiet"]
  return done.returncode, done.stderr, [call[3:-2] for call in calls(folder)]


def verbs(found):
  """The calls in short; those of ssh by what they do."""
  def short(call):
    if call[0] != "ssh":
      return call[0]
    (command,) = (part for part in call if part.startswith("--command="))
    return "run" if "--distributed" in command else (
        "install" if "tar -xzf" in command else "end_old")
  return [short(call) for call in found]


RUN_ARGUMENTS = ["pod", "--config=experiments/x.py:a=1", "--workdir=/mnt/a b"]
INSTALL = ["scp", "install", "end_old"]


def test_tpu_is_created_and_used(tmp_path):
  code, _, found = run_tpu(tmp_path, ["describe NONE", "ssh 0", "ssh 0", "ssh 0"],
                           *RUN_ARGUMENTS, CREATE_FLAGS="--spot --network=n")
  assert code == 0
  assert verbs(found) == ["describe", "create", *INSTALL, "run"]
  assert found[1] == ["create", "pod", "--accelerator-type=v5litepod-16",
                      "--version=v2-alpha-tpuv5-lite", "--spot", "--network=n"]
  assert found[2][0] == "scp" and found[2][2:] == ["pod:minw.tar.gz", "--worker=all"]
  assert found[-1] == [
      "ssh", "pod", "--worker=all", "--command=cd minw && exec python3 -m minw.main "
      "--config=experiments/x.py:a=1 --workdir=/mnt/a\\ b --distributed"]
  assert not list(tmp_path.glob("tmp*"))  # The archive is gone.


def test_tpu_that_is_there_is_reused(tmp_path):
  code, _, found = run_tpu(tmp_path, ["describe READY"], *RUN_ARGUMENTS, SETUP="true 1",
                           PYTHON="python3.12")
  assert code == 0
  assert verbs(found) == ["describe", *INSTALL, "run"]
  assert "--command=true 1 && rm -rf minw" in found[2][3]
  assert "python3.12 -m pip install -r requirements-tpu.txt" in found[2][3]


def test_tpu_archive_holds_the_code(tmp_path):
  code, errors, _ = run_tpu(
      tmp_path, ["describe READY"], *RUN_ARGUMENTS,
      tar=f'/bin/tar "$@" && cp "$2" {tmp_path}/kept.tar.gz')
  assert code == 0, errors
  names = subprocess.run(["/bin/tar", "-tzf", tmp_path / "kept.tar.gz"], text=True,
                         capture_output=True, check=True).stdout.splitlines()
  assert {"minw/main.py", "setup.cfg", "requirements-tpu.txt"} <= set(names)
  assert not [name for name in names if name.startswith((".git/", "runs/"))]


def test_tpu_preemption_makes_a_new_slice(tmp_path):
  code, errors, found = run_tpu(tmp_path, [
      "describe READY", "ssh 0", "ssh 0", "ssh 255", "describe PREEMPTED",  # Lost.
      "describe PREEMPTED", "ssh 0", "ssh 0", "ssh 0"], *RUN_ARGUMENTS, RETRIES="1")
  assert code == 0, errors
  assert verbs(found) == ["describe", *INSTALL, "run", "describe", "describe",
                          "delete", "create", *INSTALL, "run"]


def test_tpu_saved_run_goes_on_without_copying_again(tmp_path):
  code, _, found = run_tpu(tmp_path, [
      "describe READY", "ssh 0", "ssh 0", "ssh 75", "describe READY", "ssh 0", "ssh 0"],
      *RUN_ARGUMENTS, RETRIES="1")
  assert code == 0
  assert verbs(found) == ["describe", *INSTALL, "run", "describe", "end_old", "run"]


@pytest.mark.parametrize("final", [2, 3])
def test_tpu_run_that_must_not_be_repeated(tmp_path, final):
  code, _, found = run_tpu(
      tmp_path, ["describe READY", "ssh 0", "ssh 0", f"ssh {final}"], *RUN_ARGUMENTS)
  assert code == final
  assert verbs(found).count("run") == 1


def test_tpu_failures_end_it(tmp_path):
  code, errors, found = run_tpu(tmp_path, [
      *["describe READY"] * 5, "ssh 0", "ssh 0", "ssh 9", "ssh 0", "ssh 8"],
      *RUN_ARGUMENTS, RETRIES="2")
  assert code == 8
  assert verbs(found).count("run") == 2
  assert "pod: failed 2 times" in errors


def test_tpu_without_capacity(tmp_path):
  code, _, found = run_tpu(
      tmp_path, ["describe NONE"] * 6 + ["create 1"] * 3, *RUN_ARGUMENTS)
  assert code == 1
  assert verbs(found).count("create") == 3 and "run" not in verbs(found)


@pytest.mark.parametrize("arguments, environment", [
    (["pod"], {}), ([], {}), (RUN_ARGUMENTS, {"ZONE": ""})])
def test_tpu_bad_input(tmp_path, arguments, environment):
  code, errors, found = run_tpu(tmp_path, [], *arguments, **environment)
  assert code != 0 and errors and not found


# --- JobSet.

def test_jobset_manifest():
  (spec,) = check_jobset((LAUNCH / "jobset.yaml").read_text())
  assert spec["completions"] == spec["parallelism"]
  (container,) = spec["template"]["spec"]["containers"]
  rows, columns = map(int, spec["template"]["spec"]["nodeSelector"][
      "cloud.google.com/gke-tpu-topology"].split("x"))
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert rows * columns == chips * spec["completions"]
  assert container["command"][-1] == "--distributed"


# Makes the Experiment of a command's config, on the devices that there are.
_EXPERIMENT = """
import jax
from absl import flags
from minw import cli, config_flag, experiment

def main():
  steps = experiment.Experiment(flags.FLAGS.config).num_steps
  print(len(jax.devices()), steps)

cli.run(main, config_flag.define)
"""


def test_jobset_fits_its_devices(command):
  (spec,) = check_jobset((LAUNCH / "jobset.yaml").read_text())
  (container,) = spec["template"]["spec"]["containers"]
  chips = spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
  ended = command("x", *[part for part in container["command"] if "config" in part],
                  code=_EXPERIMENT, env={
                      "JAX_PLATFORMS": "cpu",
                      "XLA_FLAGS": f"--xla_force_host_platform_device_count={chips}"})
  # 90 epochs of 1,271,167 images in batches of 1,024.
  assert ended == (0, f"{chips} {90 * (1_271_167 // 1024)}\n", "")


@pytest.mark.parametrize("old, new", [
    ("maxRestarts", "maxRestart"), ("RestartJobSetAnd", "RestartAnd"),
    ("replicas: 1", "replicas: one"), ("name: minw", "name: Minw"),
    ("[PodFailurePolicy]", "PodFailurePolicy"), ("Never", "OnFailure")])
def test_check_of_jobsets_finds(old, new):
  text = (LAUNCH / "jobset.yaml").read_text()
  assert old in text
  with pytest.raises(AssertionError):
    check_jobset(text.replace(old, new))


def test_jobset_job_against_kubernetes():
  validate = pytest.importorskip(
      "kubernetes_validate", reason="kubernetes-validate is not installed")
  text = (LAUNCH / "jobset.yaml").read_text()
  check_jobset(text)
  with pytest.raises(validate.ValidationError):
    check_jobset(text.replace("backoffLimit", "backofLimit"))
