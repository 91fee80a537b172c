"""Stand-ins for programs that the scripts in launch/ call, and checks of scripts."""

import pathlib
import subprocess

from c_programs import tool

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# A line of Bash for a stand-in, which writes down its arguments in {folder}.
RECORD = """for part in "$@"; do printf '%s\\0' "$part"; done >> {folder}/calls
printf '\\n' >> {folder}/calls
"""


def make_stub(path, text):
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)


def calls(folder):
  """The arguments of each call of a stub with RECORD in it."""
  if not (folder / "calls").exists():
    return []
  return [line.split("\0")[:-1]
          for line in (folder / "calls").read_text().split("\n")[:-1]]


def shellcheck(*paths):
  """Fails if shellcheck finds anything; skips if it is not installed."""
  done = subprocess.run([tool("shellcheck"), *paths], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
