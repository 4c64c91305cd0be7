"""One file a method; `base` is the contract."""
