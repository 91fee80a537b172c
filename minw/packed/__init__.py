"""The packed network: an integer program, and the file (.minw) that holds it.

    program   operations, and what is known of their values without data
    limits    the cost of loading and running a program, and the limits on it
    rules     the numbers in the rules of the format
    file      a program as bytes
    metadata  what a file says besides its program

The package needs no packages but NumPy and ml_dtypes.
"""

from minw.packed.file import MAGIC as MAGIC
from minw.packed.file import VERSIONS as VERSIONS
from minw.packed.file import from_bytes as from_bytes
from minw.packed.file import read as read
from minw.packed.file import read_bytes as read_bytes
from minw.packed.file import to_bytes as to_bytes
from minw.packed.file import write as write
from minw.packed.limits import UNLIMITED as UNLIMITED
from minw.packed.limits import Limits as Limits
from minw.packed.limits import check_limits as check_limits
from minw.packed.limits import cost as cost
from minw.packed.program import FLOAT_FORMATS as FLOAT_FORMATS
from minw.packed.program import LEVELS as LEVELS
from minw.packed.program import SMALLEST as SMALLEST
from minw.packed.program import Add as Add
from minw.packed.program import Concat as Concat
from minw.packed.program import Conv as Conv
from minw.packed.program import FloatNorm as FloatNorm
from minw.packed.program import Logits as Logits
from minw.packed.program import Op as Op
from minw.packed.program import Pool as Pool
from minw.packed.program import Program as Program
from minw.packed.program import Shortcut as Shortcut
from minw.packed.program import Threshold as Threshold
from minw.packed.program import Value as Value
from minw.packed.program import crop as crop
from minw.packed.program import float_dtype as float_dtype
from minw.packed.program import image_value as image_value
from minw.packed.program import infer_value as infer_value
from minw.packed.program import infer_values as infer_values
from minw.packed.program import inputs as inputs
from minw.packed.program import last_uses as last_uses
from minw.packed.program import levels as levels
from minw.packed.program import max_code as max_code
from minw.packed.program import num_thresholds as num_thresholds
from minw.packed.program import only_signs as only_signs
