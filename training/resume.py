"""What a resumed run must share with the run that it resumes."""

from config.options import TrainConfig
from config.rules import names

_ALWAYS = (None, "elit", "dfm")  # compared whatever the run is; `when` names the conditions of others

# What a resumed run must share with the run that it resumes, or it would silently be another one: …
SAME = names(TrainConfig, resume="same", when=_ALWAYS)


# … and what the user may change on purpose, by --allow-change.
CHANGEABLE = names(TrainConfig, resume="changeable", when=_ALWAYS)


LOCK = "run.lock"  # in the run folder while a run writes there


DATA_SIZE = "data_size"  # no option, but changed by --data-dir


def format_option(value) -> str:
    """An option's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
