"""This machine: devices, memory, allocator, processes, and environment variables for speed."""
