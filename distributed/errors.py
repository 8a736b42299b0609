"""What cannot run, said in the same four parts as bitdistill.errors.UserError, which this room may not import."""


class Refusal(ValueError):
    """A combination of settings, or a machine, that DeepSpeed cannot serve: which, and what to do."""

    def __init__(self, field: str, expected: str, got: str, do: str):
        super().__init__(f"{field}: expected {expected}; got {got}. {do}")
