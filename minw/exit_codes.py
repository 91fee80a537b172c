"""Exit codes of all commands. 0 means that everything was done."""

import os
import signal

FAILURE = 1  # A bug, whose traceback is printed, or a part of the work failed.
BAD_INPUT = 2  # The user has to mend something, which the message names.
DIVERGED = 3  # The loss became infinite or NaN.
IO_ERROR = os.EX_IOERR  # 74: a file cannot be written or read.
PREEMPTED = os.EX_TEMPFAIL  # 75: the same command starts or resumes the run.
INTERRUPTED = 128 + signal.SIGINT  # 130
BROKEN_PIPE = 128 + signal.SIGPIPE  # 141: no one reads the output any more.
