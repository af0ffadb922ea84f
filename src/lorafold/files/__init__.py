"""Files that lorafold writes: atomic directories, records, model cards and HTML pages, and its
cache.
"""
