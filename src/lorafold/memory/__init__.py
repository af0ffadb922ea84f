"""Will it fit? The training step traced without values, by term."""
