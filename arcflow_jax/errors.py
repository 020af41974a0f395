"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input: the message is one line that says what was wrong and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: object) -> str:
    """What another library's exception (or a value) says, on one line and cut short, for a UserError to quote."""
    return " ".join(str(error).split())[:200]
