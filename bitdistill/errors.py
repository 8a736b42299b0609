"""A user's mistake, always said in the same way: which field, what was expected, what came instead, and what to do."""


class UserError(ValueError):
    """A mistake in the user's input or surroundings, never a defect of ours.

    The entry points print it without a traceback and exit with status 2.

    Args:
        field: the setting, column, file or tensor that is wrong.
        expected: what would have been right.
        got: what came instead.
        do: the next thing to try.
    """

    def __init__(self, field: str, *, expected: str, got: str, do: str):
        self.field, self.expected, self.got, self.do = field, expected, got, do
        super().__init__(f"{field}: expected {expected}; got {got}. {do}")
