"""Sublet on one machine without containers: its tools, its servers and its services.

Only the standard library is imported here, because this code runs before anything is installed.
"""
