"""The simulated world: the machines of host and guest in one process, in virtual time."""
