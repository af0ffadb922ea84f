"""Reading and writing of adapters in PEFT's format, which one table describes for all methods."""
