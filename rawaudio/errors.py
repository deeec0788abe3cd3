"""Errors that a user can mend, apart from mistakes of ours."""


class UserError(ValueError):
    """What was asked for cannot be done; one line that says why, and the way out.

    Commands print it and end. Any other ValueError is a mistake of ours, with a traceback.
    """
