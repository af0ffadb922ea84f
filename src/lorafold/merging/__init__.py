"""Implements `lorafold merge`: the target weights, the plan, merging and rounding, writing, and the
merge report.
"""
