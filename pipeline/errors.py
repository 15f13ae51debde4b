"""The two families of exceptions that end a command in one message, and what is safe to print."""


class InputError(ValueError):
    """A user's mistake: the message says what is wrong, where, and what to do.

    Every door to the outside (configuration, store, shards, registry) raises a subclass.
    The command line prints the message alone and exits with 2.
    """


class FailedError(RuntimeError):
    """Work that failed for good through nobody's mistake; the message says what to do next.

    The command line prints the message alone and exits with 1.
    """


def printable(text: str) -> str:
    """`text` without what a terminal would obey: names, tags and reasons may come from anybody."""
    mark = "\N{REPLACEMENT CHARACTER}"
    return "".join(each if each.isprintable() or each in "\n\t" else mark for each in text)
