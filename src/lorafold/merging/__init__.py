"""`lorafold merge`: the weights to fold into, the plan, the folding by shards, the certificate."""
