"""The two families of exceptions that end a command in one message instead of a traceback."""


class InputError(ValueError):
    """A user's mistake: the message says what is wrong, where, and what to do.

    Every door to the outside (configuration, store, shards, registry) raises a subclass.
    The command line prints the message alone and exits with 2.
    """


class FailedError(RuntimeError):
    """Work that failed for good through nobody's mistake; the message says what to do next.

    The command line prints the message alone and exits with 1.
    """
