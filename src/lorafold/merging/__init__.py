"""`lorafold merge`: into which target, shard by shard, with a certificate."""
