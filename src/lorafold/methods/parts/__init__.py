"""What methods are made of, or laid beside: token rows, whole modules, biases, virtual tokens."""
