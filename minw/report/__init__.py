"""Tables and figures made from runs, in the form of the paper's.

`minw.report.__main__` describes the commands.
"""

from minw.report.comparison import compare
from minw.report.records import collect
from minw.report.records import read
from minw.report.records import record

__all__ = ["collect", "compare", "read", "record"]
