"""How easily fine-tuning undoes a behaviour of an adapter: log-odds of refusal before and after,
and defences.
"""
