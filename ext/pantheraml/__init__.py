"""PantheraML: fine-tune language models in the background, watched and steered live.

>>> import pantheraml as pm
>>> run = pm.finetune("Qwen/Qwen2.5-0.5B-Instruct", data="train.jsonl", max_steps=200)
>>> run.pause(); run.set(learning_rate=1e-4); run.resume()
>>> run.watch()                # its plan, then its steps; in a notebook the live panel
>>> run = pm.attach()          # after a restart of the kernel
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantheraml.api import (
        RunInfo,
        attach,
        finetune,
        monitor,
        plan,
        preview,
        profile,
        program,
        resume,
        runs,
    )
    from pantheraml.commands import Command, Evaluation, Sample
    from pantheraml.comparing import Comparison, compare
    from pantheraml.errors import (
        BusyError,
        CorruptError,
        DeniedError,
        Error,
        InternalError,
        InvalidError,
        IOFailed,
        NoMemoryError,
        NotFoundError,
        NotInThisVersion,
        PeerError,
        RunFailed,
        TimedOut,
        TooManyViewers,
    )
    from pantheraml.lora import LoRA
    from pantheraml.memory import Plan
    from pantheraml.profiles import Profile
    from pantheraml.record import Checkpoint
    from pantheraml.run import Run
    from pantheraml.sharing import Share
    from pantheraml.steps import Program

#: The one place where it stands: pyproject.toml reads it here.
__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "Checkpoint",
    "Command",
    "Comparison",
    "CorruptError",
    "DeniedError",
    "Error",
    "Evaluation",
    "IOFailed",
    "InternalError",
    "InvalidError",
    "LoRA",
    "NoMemoryError",
    "NotFoundError",
    "NotInThisVersion",
    "PeerError",
    "Plan",
    "Profile",
    "Program",
    "Run",
    "RunFailed",
    "RunInfo",
    "Sample",
    "Share",
    "TimedOut",
    "TooManyViewers",
    "attach",
    "compare",
    "finetune",
    "monitor",
    "plan",
    "preview",
    "profile",
    "program",
    "resume",
    "runs",
]

#: Where each is. What only prepares data, or only reads a log, loads nothing else.
_HOMES = {
    "BusyError": "errors",
    "Checkpoint": "record",
    "Command": "commands",
    "Comparison": "comparing",
    "CorruptError": "errors",
    "DeniedError": "errors",
    "Error": "errors",
    "Evaluation": "commands",
    "IOFailed": "errors",
    "InternalError": "errors",
    "InvalidError": "errors",
    "LoRA": "lora",
    "NoMemoryError": "errors",
    "NotFoundError": "errors",
    "NotInThisVersion": "errors",
    "PeerError": "errors",
    "Plan": "memory",
    "Profile": "profiles",
    "Program": "steps",
    "Run": "run",
    "RunFailed": "errors",
    "RunInfo": "api",
    "Sample": "commands",
    "Share": "sharing",
    "TimedOut": "errors",
    "TooManyViewers": "errors",
    "attach": "api",
    "compare": "comparing",
    "finetune": "api",
    "monitor": "api",
    "plan": "api",
    "preview": "api",
    "profile": "api",
    "program": "api",
    "resume": "api",
    "runs": "api",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: Any = getattr(import_module(f"pantheraml.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Say what there is, loaded or not."""
    return sorted({*globals(), *__all__})
