"""The process on the stand-in: opens the model, takes one step, generates two tokens, writes what it met as JSON.

``python -P -m launchers.doctor.portability.probe REQUEST RESULT``
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.compose import build, load_resolved
from configs.errors import CrosstuneError, ModelError
from configs.schema.doctor import PortabilityConfig
from launchers.doctor import tripwire
from launchers.doctor.portability.shrink import check_memory, measure, shrink
from launchers.failure import leave_error


def main(request: Path, model_dir: Path, result: Path) -> None:
    """Probes; the result is written whatever happens to the model."""
    tripwire.activate()
    cfg = load_resolved(request)
    try:
        content = Probe(cfg, model_dir).run()
    except CrosstuneError as error:
        leave_error(error)
    else:
        result.write_text(json.dumps(content), encoding="utf-8")


class Probe:
    """One look at one model.

    Args:
        cfg: the command's config.
        model_dir: folder of the model.
    """

    def __init__(self, cfg: PortabilityConfig, model_dir: Path) -> None:
        from train.devices.base import Device

        self.cfg, self.model_dir = cfg, model_dir
        self.device = build(cfg.device, Device)
        self.device.activate(0)
        from launchers.doctor.portability.watch import Watch

        self.watch = Watch()
        tripwire.mend = _mend()
        self.failures: list[dict[str, Any]] = []
        self.stages: list[str] = []

    def run(self) -> dict[str, Any]:
        """Stage after stage; one that fails does not keep the next from being tried where it can be."""
        import torch

        from train.models.load import dtype_name, resolve_precision

        warnings.simplefilter("ignore")
        dtype = resolve_precision(self.cfg.model.precision, self.device, on_note=lambda note: None)
        found: dict[str, Any] = {
            "device": torch.get_device_module("npu").get_device_name(),
            "versions": self.device.versions(),
            "precision": dtype_name(dtype),
        }
        config, found["cut"] = self._config()
        found["size"] = self._check_size(config, dtype)
        model = self._stage("opening", lambda: self._open(config, dtype))
        if model is not None:
            found["class"] = type(model).__name__
            found["parameters"] = measure(model).parameters
            if self._stage("moving to the device", lambda: model.to(self.device.torch_device)) is not None:
                self._step(model, config)
        return found | {
            "stages": self.stages,
            "failures": self.failures,
            "operators": {name: noted.as_dict() for name, noted in self.watch.operators.items()},
            "rare": {name: rare.as_dict() for name, rare in self.watch.rare.items()},
            "narrowed": {name: rare.as_dict() for name, rare in self.watch.narrowed.items()},
        }

    def _config(self) -> tuple[Any, str]:
        from train.models.load import load_config

        trusted = self.cfg.model.trust_remote_code
        config = load_config(self.model_dir, trust_remote_code=trusted)
        if not self.cfg.layers:
            return config, "all layers, own weights"
        content, cut = shrink(config.to_dict(), self.cfg.layers)
        return type(config).from_dict(content), str(cut)

    def _check_size(self, config: Any, dtype: Any) -> dict[str, Any] | None:
        """None where the model cannot be built without memory; then nobody knows before it is."""
        import psutil
        import torch

        try:
            with torch.device("meta"):
                size = measure(self._from_config(config, dtype))
        except Exception:  # the model's own code may do anything here; opening it says what is wrong
            return None
        layers = self.cfg.layers or int(getattr(config.get_text_config(), "num_hidden_layers", 1))
        check_memory(size, psutil.virtual_memory().available, layers)
        return asdict(size)

    def _open(self, config: Any, dtype: Any) -> Any:
        from train.models.load import load_model

        trusted = self.cfg.model.trust_remote_code
        if self.cfg.layers:
            self.device.seed(0)
            return self._from_config(config, dtype)
        return load_model(self.model_dir, dtype=dtype, trust_remote_code=trusted)

    def _from_config(self, config: Any, dtype: Any) -> Any:
        from train.models.classes import from_config

        return from_config(config, dtype=dtype, trust_remote_code=self.cfg.model.trust_remote_code)

    def _step(self, model: Any, config: Any) -> None:
        """Forward and backward on random tokens, then two tokens of greedy decoding."""
        import torch
        from torch.nn.functional import cross_entropy

        vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 256)
        ids = torch.randint(0, vocabulary, (1, self.cfg.tokens)).to(self.device.torch_device)
        model.train()

        def forward() -> Any:
            output = model(input_ids=ids)
            logits = output.logits if hasattr(output, "logits") else output[0]
            return cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device))

        loss = self._stage("forward", forward)
        if loss is not None:
            self._stage("backward", lambda: (loss.backward(), True))
        model.eval()
        if hasattr(model, "generate"):
            prompt = {"input_ids": ids[:, :8], "attention_mask": torch.ones_like(ids[:, :8])}
            self._stage("generate", lambda: model.generate(**prompt, max_new_tokens=2, do_sample=False, pad_token_id=0))

    def _stage(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; None after a failure, which is noted."""
        from safetensors import SafetensorError

        from launchers.doctor.portability.watch import failure

        print(f"      {name}", flush=True)
        try:
            with self._watched():
                result = work()
        except SafetensorError as error:  # nothing that a device has to do with
            raise ModelError(str(self.model_dir), f"its weights cannot be read: {error}") from error
        except Exception as error:  # a model's code may raise anything: that is what we look for
            self.failures.append(failure(name, error))
            return None
        self.stages.append(name)
        return result

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with self.watch.tracker, self.watch:
            yield


def _mend() -> tripwire.Mend:
    from launchers.doctor.portability.watch import mend

    return mend


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
