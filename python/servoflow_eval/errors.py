"""What a user can get wrong: told in one line that names file, field and fix. The command line prints it and exits with 2."""


class EvalError(Exception):
    """A matrix, a checkpoint, an output folder or an environment that cannot be used as given."""
