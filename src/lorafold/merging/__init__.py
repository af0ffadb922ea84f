"""`lorafold merge`: the weights to fold into, the plan, folding, the writers, the certificate."""
