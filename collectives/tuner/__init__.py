"""The tuner: what each candidate for a call will take, and which is the fastest."""
