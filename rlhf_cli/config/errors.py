"""The ways a run ends early. Each is shown as one line; none shows a traceback."""


class UserError(Exception):
    """The command, its config or its input is wrong. Exit status 2; nothing was written."""


class RunError(Exception):
    """The run itself failed: a hand-off check, a non-finite loss, a full disk. Exit status 1."""


class PeerLost(RunError):
    """Another rank of the run is gone or did not come, which is told where it happened."""


EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: queues run the command again


class Busy(UserError):
    """Another process writes what this one would. Exit status 75: try again later."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, and what was done is saved. Exit status 75: try again later."""
