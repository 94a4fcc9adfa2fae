"""The text of an error, for messages that quote another's."""


def one_line(error: BaseException, limit: int | None = 400) -> str:
    """An error's text in one line, of at most `limit` characters; its type's name where it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
