"""The pure core of Sublet: every decision is a function of state, message and time. No I/O, no clock, no driver."""
