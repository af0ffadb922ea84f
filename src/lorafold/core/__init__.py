"""The core: layers, deltas and specs, and how deltas are attached, combined and targeted."""
