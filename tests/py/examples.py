"""An event of each kind, with every field that the message table knows, and a run.json."""

from __future__ import annotations

import json
from typing import Any

from pantheraml import sums

Event = dict[str, Any]

CAUSES = {
    "weights": 9, "adapters": 8, "gradients": 7, "optimizer": 6, "activations": 5, "workspace": 4,
    "communication": 3, "runtime": 2, "rss": 1,
}  # fmt: skip
GPU = {
    "rank": 0, "name": "card", "age": 0.5, "utilisation": 0.9, "memory_total": 100,
    "memory_used": 60, "memory_ours": 50, "memory_others": 10, "temperature": 50.0, "power": 300.0,
    "power_limit": 700.0, "clock": 1500, "clock_most": 1980, "memory_clock": 2619, "throttle": "",
    "peak_flops": 1e15, "mfu": 0.5, "missing": "fans", "trouble": "none",
}  # fmt: skip
KINDS: dict[str, Event] = {
    "state": {
        "state": "starting", "step": 3, "reason": "so", "code": "io", "rank": 0, "rewound": True,
        "waits": True, "checkpoint": "checkpoints/step-000003",
    },
    "restart": {
        "cause": "died", "reason": "killed", "rank": 1, "attempt": 1, "most": 3, "delay": 0.5,
        "from": "snapshot", "step": 3,
    },
    "plan": {
        "by_cause": CAUSES, "total": 44, "available": 99, "recompute": "norms",
        "recompute_layers": 1, "head_chunk": 64, "pieces": 2, "moments_8bit": True, "unpacked": 4,
        "offload": "none", "offload_layers": 0, "host": 0, "parameters": 1000, "trainable": 10,
        "max_steps": 100,
        "limits": {"tokens": 64, "docs": 2, "labels": 64, "max_doc": 64, "generate_length": 64},
    },
    "workers": {"workers": [{"rank": 0, "device": "cpu", "pid": 7, "state": "running"}]},
    "progress": {"what": "loading", "fraction": 0.5},
    "step": {
        "step": 4, "loss": 1.5, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 64,
        "labels": 60, "seconds": 0.5, "tokens_per_second": 128.0, "epoch": 0.1, "skipped": True,
        "loss_scale": 1024.0, "mfu": 0.4, "gpus": [GPU], "memory": [CAUSES],
    },
    "eval": {"step": 4, "loss": 1.5, "labels": 60, "seconds": 0.5, "command": 1},
    "command": {"command": 1, "verb": "set", "id": "a-1", "args": {"learning_rate": 1e-4}},
    "applied": {
        "command": 1, "verb": "set", "step": 4, "workers": [0], "args": {"learning_rate": 1e-4},
    },
    "refused": {"command": 2, "verb": "pause", "step": 4, "reason": "no"},
    "checkpoint": {
        "step": 4, "path": "checkpoints/step-000004", "name": "kept", "bytes": 10, "seconds": 0.1,
        "command": 1,
    },
    "sample": {"command": 3, "step": 4, "row": 0, "token_ids": [1, 2], "done": False},
    "profile": {
        "step": 4, "steps": 3, "seconds": 0.5, "tokens": 64, "gemm_flops": 1e12, "gemm_size": 64,
        "copy_bytes": 1e11, "copy_size": 4096, "done": True,
        "ops": [{"node": 0, "calls": 1, "seconds": 0.1, "flops": 1e6, "bytes": 1e3}],
    },
    "export": {
        "format": "peft", "path": "/out", "step": 4, "bytes": 10, "difference": 0.1, "seconds": 0.1,
    },
    "log": {"level": "warning", "message": "look", "rank": 0, "command": 1},
}  # fmt: skip


RUN: Event = {
    "format": 1, "name": "example", "model": "/none", "model_id": "none", "method": "lora",
    "dtype": "float32", "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0, "lora_targets": [],
    "lora_init": "", "max_steps": 100, "num_train_epochs": 1, "learning_rate": 1e-3,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 64,
    "packing": False, "shuffle": False, "deterministic": False, "seed": 1, "eval_steps": 0,
    "save_steps": 0, "save_total_limit": 0, "memory_limit": 0, "threads": 1, "generate_length": 0,
    "devices": ["cpu"], "train_data": "data/train.safetensors", "eval_data": "", "data": {},
    "created": 1.0, "version": "0",
}  # fmt: skip


def event(seq: int, kind: str, **fields: Any) -> Event:
    """Give one as the coordinator stamps it; fields go over the example's."""
    return {"seq": seq, "time": 1.5, "timeline": 0, "type": kind, **KINDS[kind], **fields}


def line(event: Event) -> bytes:
    """Give its line in the log, with a right sum, whatever the event is."""
    return sums.add(json.dumps(event, separators=(",", ":")).encode()) + b"\n"
