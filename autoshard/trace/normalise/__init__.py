"""One file a family of ops: rules that spell torch's many ops in the few of the normal form."""
