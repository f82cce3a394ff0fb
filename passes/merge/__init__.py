"""Passes that make one model of several, and cut parts out of one."""
