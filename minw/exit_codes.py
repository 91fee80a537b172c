"""Exit codes of all commands."""

import os
import signal

FAILURE = 1
BAD_INPUT = 2
DIVERGED = 3
IO_ERROR = os.EX_IOERR  # 74
PREEMPTED = os.EX_TEMPFAIL  # 75
INTERRUPTED = 128 + signal.SIGINT  # 130
BROKEN_PIPE = 128 + signal.SIGPIPE  # 141

# Meaning of each code. The text of --help and the table in docs/reference/commands.md
# have these words; the table adds details.
MEANINGS = {
    0: "success",
    FAILURE: "failure, which a message explains",
    BAD_INPUT: "bad input, which is found before the work starts",
    DIVERGED: "the loss or the weights became infinite or NaN",
    IO_ERROR: "a file could not be read or written",
    PREEMPTED: "preempted; the same command resumes the run",
    INTERRUPTED: "interrupted by Ctrl-C",
    BROKEN_PIPE: "output to a closed pipe",
}
# Codes of all commands. The help of a command describes its other codes.
COMMON = (0, FAILURE, BAD_INPUT, IO_ERROR, INTERRUPTED, BROKEN_PIPE)
