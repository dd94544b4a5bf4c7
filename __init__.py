"""abccl: a collective communication library with pluggable algorithms."""
