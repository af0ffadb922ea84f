"""Every method on one model and one's own data, measured: quality, forgetting, size, speed and
memory in one table.
"""
