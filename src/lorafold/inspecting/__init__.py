"""Figures of an adapter's update: its spectrum, its relation to the base, its tokens, the loss
along it; the best LoRA of a rank; a run's history; the intrinsic dimension of a task.
"""
