"""The tests. Some train on the videos and texts of the small benchmark: its folder is found by them and by what they start."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
