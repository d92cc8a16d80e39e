"""Errors that a user can act on.

Every message gives the key or file, its value, the rule that it breaks and the fix. Command-line entry points print
them without a traceback and exit with status 2; `assert` is left for our own bugs.
"""


class MegagptError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 2


class ConfigError(MegagptError):
    """A run config, a DeepSpeed config or their combination breaks one or more rules.

    Args:
        problems: one sentence per broken rule, each with key, value, rule and fix.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(MegagptError):
    """A text, tokenizer or dataset file is missing, damaged or does not fit its companions."""


class CheckpointError(MegagptError):
    """A checkpoint is missing, damaged or belongs to another model."""


class ConversionError(MegagptError):
    """A model has no exact counterpart in the target format, or its logits differ after conversion."""


class LaunchError(MegagptError):
    """The ranks of a job cannot be found out or contradict each other."""
