"""The guided first run of `lorafold quickstart`, on the embedded model."""
