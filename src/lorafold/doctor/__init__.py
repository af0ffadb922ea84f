"""`lorafold doctor`: problems and slow settings of this machine and installation."""
