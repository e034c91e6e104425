"""The verbs of the command line: each is a frozen dataclass whose fields are its flags and whose ``run`` does the work.

Heavy imports happen inside ``run``, so that help and errors come at once.
"""
