"""The rule table against execution: every sharding that it claims, and every one that holds and isn't claimed."""
