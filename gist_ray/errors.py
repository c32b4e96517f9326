"""The one error a user can mend."""


class InputError(ValueError):
    """Bad input: the message names the value, the limit and the remedy.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """
