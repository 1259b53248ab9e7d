"""Lets the tests here import ``fake_run`` beside them; what is killed leaves nothing behind."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "tools" / "chaos"))
from reap import at_end  # noqa: E402

at_end()
