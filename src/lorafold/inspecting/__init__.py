"""What an adapter's update is: spectra, its place in the base, what it reads and writes, its paths.
"""
