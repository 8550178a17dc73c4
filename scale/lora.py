"""LoRA (arXiv 2106.09685), swapped in from outside by one call of add; at rank 0 it does nothing.

Adapters are the policy's state: what the optimizer moves, checkpoints and theta_i hold, and RFT
starts from. theta_0 has B = 0, so it is the base model. Sampling and exports merge them.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from config import Config, LoRAConfig, write_json
from model import Linear, Transformer
from scale import parallel


class AdaptedLinear(Linear):
    """W x + b + alpha / rank * B A x. Names and A's first values are as in PEFT."""

    def __init__(self, base: Linear, cfg: LoRAConfig, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, cfg.alpha / cfg.rank
        self.lora_A = Linear(base.in_features, cfg.rank, bias=False)
        self.lora_B = Linear(cfg.rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x)) * self.scale


class Adapted(Transformer):
    """A policy whose state is its adapters."""

    def state_dict(self, *arguments, **named) -> dict[str, Tensor]:
        state = super().state_dict(*arguments, **named)
        return {name: tensor for name, tensor in state.items() if ".lora_" in name}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError("the state is not that of this policy's adapters")
        super().load_state_dict(state, strict=False)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Merged weights are whole, and float32 whatever the base's dtype."""
        state, scale = super().state_dict(), self.lora.alpha / self.lora.rank
        for name, weight in state.items():
            factors = [f"{name.removesuffix('.weight')}.lora_{factor}.weight" for factor in "BA"]
            if factors[0] in state:
                b, a = (parallel.whole_tensor(state[factor]) for factor in factors)
                weight = torch.addmm(parallel.whole_tensor(weight).float(), b, a, alpha=scale)
            if ".lora_" not in name:
                yield name, weight

    def save_adapters(self, path: Path) -> None:
        """Write a directory that PEFT loads onto the base model (a collective)."""
        state = parallel.full_state(self.state_dict().items())

        def write() -> None:
            path.mkdir(parents=True, exist_ok=True)
            config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.lora.rank}
            config |= {"lora_alpha": self.lora.alpha, "base_model_name_or_path": str(self.source)}
            config["target_modules"] = sorted({name.split(".")[-3] for name in state})
            write_json(path / "adapter_config.json", config)
            tensors = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
            (path / "saving.tmp").write_bytes(save(tensors))
            (path / "saving.tmp").replace(path / "adapter_model.safetensors")

        parallel.on_main(write)


def add(policy: Transformer, cfg: Config) -> Transformer:
    """Freeze the policy and give every linear layer of its blocks an adapter, at rank 0 none."""
    if cfg.lora.rank == 0:
        return policy
    policy.requires_grad_(False)
    generator = torch.Generator().manual_seed(cfg.seed)
    for module in list(policy.model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear):
                setattr(module, name, AdaptedLinear(layer, cfg.lora, generator))
    policy.__class__, policy.lora = Adapted, cfg.lora
    return policy
