"""PantheraML: fine-tune language models in the background, watched and steered live.

>>> import pantheraml as pm
>>> run = pm.finetune("Qwen/Qwen2.5-0.5B-Instruct", data="train.jsonl", max_steps=200)
>>> run.pause(); run.set(learning_rate=1e-4); run.resume()
>>> run = pm.attach()          # after a restart of the kernel
"""

from pantheraml.api import (
    RunInfo,
    attach,
    finetune,
    monitor,
    package_version,
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
)
from pantheraml.lora import LoRA
from pantheraml.memory import Plan
from pantheraml.profiles import Profile
from pantheraml.record import Checkpoint
from pantheraml.run import Run
from pantheraml.sharing import Share
from pantheraml.steps import Program

__version__ = package_version()

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
