"""The core: layers, deltas and specs, and code that attaches, combines and selects them."""
