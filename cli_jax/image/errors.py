"""The one error that a picture can cause."""


class ImageError(ValueError):
    """A picture that cannot be used; the message is the reason, ready for a log line."""
