"""The protocol between clients, workers and services. No I/O, no clock, no driver."""
