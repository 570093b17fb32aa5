"""One source of samples: what tests, benches, the command line and the docs know about each op.

`SPECS` maps an op's public name to its `OpSpec`; `pyops/testing/samples/` holds one file per family.
"""

from pyops.testing.gate import poison, relative_error, within_gate
from pyops.testing.registry import SPECS, ErrorCase, OpSpec, Sample
from pyops.testing.samples import attention as _attention  # noqa: F401  (registers its ops)
from pyops.testing.samples import blocks as _blocks  # noqa: F401
from pyops.testing.samples import capsule as _capsule  # noqa: F401
from pyops.testing.samples import cross_entropy as _cross_entropy  # noqa: F401
from pyops.testing.samples import dense as _dense  # noqa: F401
from pyops.testing.samples import depthwise as _depthwise  # noqa: F401
from pyops.testing.samples import linear as _linear  # noqa: F401
from pyops.testing.samples import norm as _norm  # noqa: F401
from pyops.testing.samples import rnn as _rnn  # noqa: F401
from pyops.testing.samples import sampling as _sampling  # noqa: F401
from pyops.testing.samples import window_attention as _window_attention  # noqa: F401

__all__ = ["SPECS", "ErrorCase", "OpSpec", "Sample", "poison", "relative_error", "within_gate"]
