"""Tests of what runs on a GPU, on tensors that say cuda:0 and compute on the CPU (`lib/shadow.py`).

    SHADOW_DEVICE=1 pytest tests/devices

They need processes of their own, in which torch believes that there is a GPU.
"""

import os

collect_ignore_glob = ["test_*.py"]
if os.environ.get("SHADOW_DEVICE"):
    import shadow

    shadow.pretend()  # before lorafold is imported
    collect_ignore_glob.clear()
