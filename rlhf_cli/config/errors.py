"""The two ways a run ends badly. Both are shown as one line; neither shows a traceback."""


class UserError(Exception):
    """The command, its config or its input is wrong. Exit status 2; nothing was written."""


class RunError(Exception):
    """The run itself failed: a hand-off check, a non-finite loss, a full disk. Exit status 1."""
