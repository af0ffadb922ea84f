"""Measures how easily fine-tuning undoes a behaviour of an adapter, as log-odds of refusal before
and after, and the effect of defences.
"""
