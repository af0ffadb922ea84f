"""What an adapter's update is: its spectra, where it lies in the base, what it reads and writes,
and how the loss runs along it.
"""
