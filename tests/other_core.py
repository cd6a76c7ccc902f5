"""A pytest plugin that runs tests on another build of the core: `pytest -p other_core`, EDGE_MOE_CORE its path."""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("edge_moe._core", os.environ["EDGE_MOE_CORE"])
sys.modules["edge_moe._core"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["edge_moe._core"])
