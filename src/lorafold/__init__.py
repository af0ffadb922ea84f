"""lorafold: low-rank adapters of transformer models, trained, folded, composed and measured."""
