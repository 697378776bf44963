"""The two ways a run ends early on purpose, and their exit statuses."""

# Exit statuses that launchers rely on: only PREEMPTED is worth a rerun of the same command.
OK = 0
FAILED = 1
USER_MISTAKE = 2
PREEMPTED = 75


class UserError(Exception):
    """A mistake in flags, config, files or data, as one line.

    The line names the culprit (key, flag or file), its value, and what is accepted.

    `lfm_jax.main` prints the message to stderr without a traceback and exits with status 2.
    """


class Preempted(Exception):
    """The machine is about to be taken away and the state has been saved: exit status 75."""
