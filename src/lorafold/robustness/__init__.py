"""How little undoes a behaviour that lives in an update: a few rows of ordinary tuning, the
log-odds of refusal before and after, and what holds against it.
"""
