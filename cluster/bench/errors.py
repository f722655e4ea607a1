"""Errors of the load generator.

BenchError             an option, a trace or a workload that cannot be run; the message names the remedy
+-- TargetError        the server cannot be reached, or refuses what every request needs
RequestFailed          one request got no complete answer; it is recorded, and the run goes on
"""


class BenchError(Exception):
    """The run cannot start as asked for. The message names the cause and the remedy."""


class TargetError(BenchError):
    """The server cannot be reached, does not serve the model, or refuses a request of the form that all will have."""


class RequestFailed(Exception):
    """One request got no complete answer. The message is the reason, short enough to be counted by."""
