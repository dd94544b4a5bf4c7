"""The `abccl` command: verify, show and draw schedules, and measure them."""
