"""Parts of methods and of adapters: token rows, whole modules, biases, virtual tokens, mixtures."""
