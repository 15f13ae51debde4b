"""The one family of exceptions that a user can cause and can mend."""


class InputError(ValueError):
    """A user's mistake: the message says what is wrong, where, and what to do.

    Every door to the outside (configuration, store, shards, registry) raises a subclass.
    The command line prints the message alone and exits with 2.
    """
