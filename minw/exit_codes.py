"""Exit codes of all commands. Code 0 means success."""

import os
import signal

FAILURE = 1  # There is a bug, whose traceback is printed, or a part of the work failed.
BAD_INPUT = 2  # The input is not valid, and the message says what to fix.
DIVERGED = 3  # The loss became infinite or NaN.
IO_ERROR = os.EX_IOERR  # 74: A file cannot be written or read.
PREEMPTED = os.EX_TEMPFAIL  # 75: The same command starts or resumes the run.
INTERRUPTED = 128 + signal.SIGINT  # 130: Ctrl-C or SIGINT interrupted the command.
BROKEN_PIPE = 128 + signal.SIGPIPE  # 141: The output went to a closed pipe.
