"""From runs to tables and figures beside the paper's: see `minw.report.__main__`."""

from minw.report.comparison import compare
from minw.report.records import collect
from minw.report.records import read
from minw.report.records import record

__all__ = ["collect", "compare", "read", "record"]
