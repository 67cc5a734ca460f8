"""Models that no machine here holds, as manifests without files, and the plans of their merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streammerge.adapter import (
    DTYPES,
    LINEAR,
    Adapter,
    AdapterConfig,
    Columns,
    NameTable,
    TensorFile,
)
from streammerge.budget import Budget
from streammerge.planner import make_plan
from streammerge.plans import Plan
from streammerge.recipe import Recipe

DENSITY = 0.2
BF16 = DTYPES.index("BF16")

Layers = Mapping[str, tuple[int, int]]
"""Each target's m and n."""


@dataclass(frozen=True)
class Case:
    """So many adapters of one model, and how they are merged."""

    name: str
    layers: Layers
    adapters: int
    rank: int
    method: str

    @property
    def density(self) -> float | None:
        """The share that is kept, for the methods that have one."""
        return DENSITY if self.method.startswith("ties") else None

    def plan(self, memory: int) -> Plan:
        """Return the plan for workers of one thread with so many bytes each."""
        manifests = self.manifests()
        recipe = Recipe(
            adapters=tuple(manifest.path for manifest in manifests),
            method=self.method,
            weights=(1.0,) * self.adapters,
            density=self.density,
        )
        return make_plan(manifests, recipe, Budget(memory, "each worker"))

    def manifests(self) -> list[Adapter]:
        """Return the adapters, which lie nowhere."""
        table = NameTable()
        return [self._manifest(f"adapter{i:04d}", table) for i in range(self.adapters)]

    def _manifest(self, path: str, table: NameTable) -> Adapter:
        """Return an adapter as a reader would describe it."""
        rows, offset = [], 0
        for target, (m, n) in self.layers.items():
            a, b = offset, offset + 2 * self.rank * n
            offset = b + 2 * self.rank * m
            shape = (LINEAR, self.rank, m, n, (n, 0, 0, 0))
            name = table.add(target)
            rows.append((name, *shape, self.rank, 2.0 * self.rank, 1.0, 0, 0, a, BF16, 0, b, BF16))
        return Adapter(
            path=path,
            config=AdapterConfig(rank=self.rank, alpha=2.0 * self.rank),
            files=(TensorFile(f"{path}/adapter_model.safetensors", offset, 0, 0),),
            table=table,
            columns=Columns.of_rows(rows),
        )


def llama_70b() -> dict[str, tuple[int, int]]:
    """80 layers, all seven projections: 560 targets."""
    hidden, kv, inner = 8192, 1024, 28672
    of_a_layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{layer}.{name}": sides
        for layer in range(80)
        for name, sides in of_a_layer.items()
    }


def mixture_of_experts() -> dict[str, tuple[int, int]]:
    """58 layers of 256 experts and a shared one, three projections each; 61 of attention: 45,023
    targets."""
    hidden, inner = 7168, 2048
    attention = {
        "q_a_proj": (1536, hidden),
        "q_b_proj": (24576, 1536),
        "kv_a_proj_with_mqa": (576, hidden),
        "kv_b_proj": (32768, 512),
        "o_proj": (hidden, 16384),
    }
    expert = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    layers = {}
    for layer in range(61):
        for name, sides in attention.items():
            layers[f"model.layers.{layer}.self_attn.{name}"] = sides
        if layer < 3:
            continue
        for which in (*(f"experts.{i}" for i in range(256)), "shared_experts"):
            for name, sides in expert.items():
                layers[f"model.layers.{layer}.mlp.{which}.{name}"] = sides
    return layers


def all_cases() -> list[Case]:
    """What is projected."""
    return [
        *(Case("70B", llama_70b(), 1000, 64, method) for method in ("ties_svd", "svd")),
        *(Case("MoE", mixture_of_experts(), 8, 16, method) for method in ("linear", "ties_svd")),
    ]
