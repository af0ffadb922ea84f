"""How little ordinary tuning undoes a behaviour that lives in an update: the log-odds of refusal
before and after, and defences.
"""
