"""What goes wrong, as exceptions. Every message names the field and the cause."""


class Error(Exception):
    """Base of all exceptions that servoflow raises on its own account."""


class InvalidInput(Error, ValueError):
    """Files, fields or arguments are wrong; the message says which, and often what to do."""


class CheckFailed(Error):
    """A comparison or gate did not hold."""


class RuntimeFailure(Error, RuntimeError):
    """The machine or device failed: out of memory, an I/O error, a result that is not finite."""
