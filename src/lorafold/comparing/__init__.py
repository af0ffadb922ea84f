"""Every method on the same model and data: measured, tabulated and plotted."""
