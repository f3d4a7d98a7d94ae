"""A checkout need not be installed: its integrations/ is then found beside the package, as `muon_dist.integrations`."""

from importlib.util import find_spec
from pathlib import Path

import muon_dist

if find_spec("muon_dist.integrations") is None:
    muon_dist.__path__.append(str(Path(__file__).parent.parent))
