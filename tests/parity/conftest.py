"""Where the shared fixtures are, and that nothing is looked up on a network."""

import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
