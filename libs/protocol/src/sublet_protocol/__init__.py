"""What clients, workers and services agree on. No I/O, no clock, no driver."""
