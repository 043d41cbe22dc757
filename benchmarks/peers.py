"""What a worker process computes with each library.

The classes have the same methods, of which a library may lack some: `load` reads a checkpoint, the others compute one
workload and return when it is done, on a GPU too. Libraries are imported by the constructor, so that a worker holds
its own and no other. Embeddings are means of the last hidden state over a protein's residues.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
LORA_RANK, LORA_TARGETS = 8, ["query", "value"]
BATCH = 8  # sequences, in transformers' padded batches
FAIR_ESM_TOKENS = 4096  # fair-esm's `extract` has this default
TOLD = 16  # tokens of a product whose numbers are compared


def cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@functools.lru_cache(2)
def matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).random((rows, columns), np.float32) - np.float32(0.5)


def product_operands(tokens: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """x and w of a linear layer, whose product is x · wᵀ."""
    return matrix(tokens, inputs), matrix(outputs, inputs)


def gemm_operands(rows: int, length: int, hidden: int, heads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs x, w whose products x · wᵀ are those of one encoder layer: six linear layers, scores and contexts."""
    random, size = np.random.default_rng(0), hidden // heads
    linear = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
    attention = [(length, size), (size, length)]
    shapes = [((rows * length, i), (o, i)) for o, i in linear]
    shapes += [((rows, heads, length, i), (rows, heads, o, i)) for o, i in attention]
    return [(random.standard_normal(x, np.float32), random.standard_normal(w, np.float32)) for x, w in shapes]


def residues(length: int) -> list[list[int]]:
    """A protein as folding has it, of the twenty amino acids by their number."""
    return np.random.default_rng(0).integers(0, 20, (1, length)).tolist()


def residue_states(length: int, width: int) -> np.ndarray:
    """What a stem may say of a protein's residues [1, length, width]."""
    return np.random.default_rng(0).standard_normal((1, length, width), np.float32)


def is_folding_model(folder: str) -> bool:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return json.load(file).get("is_folding_model", False)


class Ours:
    def __init__(self, dtype: str):
        import mlx.core as mx
        from transformers import AutoTokenizer

        import mlx_esm_hf
        from mlx_esm_hf import ops
        from mlx_esm_hf.jobs.embed import embeddings
        from mlx_esm_hf.jobs.protein_model import ProteinModel

        self.mx, self.library, self.Tokenizer, self.dtype = mx, mlx_esm_hf, AutoTokenizer, dtype
        self.embeddings, self.ProteinModel, self.ops = embeddings, ProteinModel, ops
        self.product_of: list[int] | None = None

    def load(self, folder: str) -> None:
        self.folder, self.case = folder, None
        folds = is_folding_model(folder)
        cls = self.library.MLXEsmForProteinFolding if folds else self.library.MLXAutoModelForMaskedLM
        self.model = cls.from_pretrained(folder, dtype=self.dtype)
        self.tokenizer = self.Tokenizer.from_pretrained(folder)
        self.mx.eval(self.model.parameters())

    def about(self) -> dict[str, str]:
        from mlx_esm_hf.runtime import blas

        kernels = getattr(sys.modules.get("mlx_esm_hf.ops.kernels"), "STATE", "none in this version")
        device = str(self.mx.default_device())
        return {"version": version("mlx-esm-hf"), "device": device, "BLAS": blas.bind(), "kernels": kernels}

    def weights_bytes(self) -> int:
        return sum(array.nbytes for _, array in self.model.named_parameters())

    def embed(self, sequences: list[str]) -> np.ndarray:
        model, last = self.ProteinModel(self.model.base_model, self.tokenizer), self.model.config.num_hidden_layers
        ids = [model.vocabulary.encode(sequence) for sequence in sequences]
        found = self.embeddings(model, ids, [last], ["mean"])
        return np.stack([arrays["mean"] for arrays in found])

    def hidden(self, ids: list[list[int]]) -> Any:
        return self._done(self.model.base_model(self.mx.array(ids)).last_hidden_state)

    def contacts(self, ids: list[list[int]]) -> Any:
        ids = self.mx.array(ids)
        return self._done(self.model.predict_contacts(ids, self.mx.ones_like(ids)))

    def trunk(self, length: int) -> Any:
        """The state of pairs after one pass of a folding trunk."""
        mx = self.mx
        s = mx.array(residue_states(length, self.model.config.esmfold_config.trunk.sequence_state_dim))
        zeros, ones = mx.zeros((1, length), dtype=mx.int32), mx.ones((1, length), dtype=mx.int32)
        return self._done(self.model.trunk(s, zeros, mx.arange(length)[None], ones, 0)["s_z"])

    def fold(self, length: int) -> Any:
        """The atoms of a protein after one pass."""
        return self._done(self.model(self.mx.array(residues(length)), num_recycles=0).positions)

    def train(self, case: str, batches: list[dict[str, Any]], lora: bool = False) -> Any:
        """A step of AdamW for each batch. A case begins with the checkpoint's weights.

        The answer is the losses of its first two steps, since a warm-up takes as many steps as it has time for.
        """
        if case != self.case:
            self._begin(case, lora)
        for batch in batches:
            inputs = {name: self.mx.array(value) for name, value in batch.items()}
            loss, gradients = self.step(inputs)
            self.optimizer.update(self.model, gradients)
            del gradients
            self.mx.eval(loss, self.model.parameters(), self.optimizer.state)
            self.losses = [*self.losses, loss][:2]
        return self.mx.stack(self.losses)

    def _begin(self, case: str, lora: bool) -> None:
        import mlx.nn as nn

        from mlx_esm_hf.training.adapters import LoraConfig, add_adapters
        from mlx_esm_hf.training.optimizer import AdamW

        if self.case is not None:
            self.load(self.folder)
        self.case, self.losses = case, []
        if lora:
            add_adapters(self.model, LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS))
        self.model.train()
        self.optimizer = AdamW(self.model.trainable_parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.step = nn.value_and_grad(self.model, lambda inputs: self.model(**inputs).loss)

    def peak(self, operations: float) -> None:
        """Multiply-adds on registers alone, in the kernels' instruction set."""
        from mlx_esm_hf.ops import kernels

        kernels.native.multiply_adds(operations)

    def product(self, shape: list[int], repeats: int, blas: bool = False) -> Any:
        """A linear layer by our kernel or, with `blas`, by what multiplies MLX's matrices; of `shape` tokens, inputs
        and outputs. The answer is of the first tokens."""
        mx = self.mx
        if self.product_of != shape:
            self.product_of, self.x, self.w = shape, *map(mx.array, product_operands(*shape))
            mx.eval(self.x, self.w)
        x, w = self.x, self.w
        done = [x @ w.T if blas else self.ops.linear(x, w) for _ in range(repeats)]
        mx.eval(done)
        return done[0][:TOLD]

    def gemm(self, layer: dict[str, int], repeats: int) -> None:
        mx = self.mx
        if not hasattr(self, "operands"):
            to = getattr(mx, self.dtype)
            self.operands = [(mx.array(x, to), mx.array(w, to)) for x, w in gemm_operands(**layer)]
            mx.eval(self.operands)
        for _ in range(repeats):
            mx.eval([x @ w.swapaxes(-1, -2) for x, w in self.operands])

    def numpy(self, x: Any) -> np.ndarray:
        return x if isinstance(x, np.ndarray) else np.array(x.astype(self.mx.float32))

    def _done(self, x: Any) -> Any:
        self.mx.eval(x)
        return x


class Torch:
    """What transformers and fair-esm have in common."""

    def __init__(self, dtype: str):
        import torch

        torch.set_num_threads(len(cores()))
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.product_of: list[int] | None = None

    def product(self, shape: list[int], repeats: int) -> Any:
        """The same by torch."""
        if self.product_of != shape:
            self.product_of, self.x, self.w = shape, *map(self.torch.from_numpy, product_operands(*shape))
        with self.torch.inference_mode():
            for _ in range(repeats):
                done = self.torch.nn.functional.linear(self.x, self.w)
        return done[:TOLD]

    def gemm(self, layer: dict[str, int], repeats: int) -> None:
        if not hasattr(self, "operands"):
            self.operands = [
                tuple(self.torch.tensor(a, dtype=self.dtype, device=self.device) for a in pair)
                for pair in gemm_operands(**layer)
            ]
        with self.torch.inference_mode():
            for _ in range(repeats):
                for x, w in self.operands:
                    x @ w.mT
        self._done()

    def numpy(self, x: Any) -> np.ndarray:
        return x.detach().float().cpu().numpy()

    def _tensor(self, ids: list[list[int]]) -> Any:
        return self.torch.tensor(ids, device=self.device)

    def _means(self, hidden: Any, sequences: Sequence[str]) -> list[Any]:
        return [row[1 : len(sequence) + 1].float().mean(0) for row, sequence in zip(hidden, sequences, strict=True)]

    def _done(self, x: Any = None) -> Any:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return x


class Transformers(Torch):
    def __init__(self, dtype: str):
        super().__init__(dtype)
        import transformers

        self.library, self.Tokenizer = transformers, transformers.AutoTokenizer

    def load(self, folder: str) -> None:
        self.folder, self.case = folder, None
        cls = self.library.EsmForProteinFolding if is_folding_model(folder) else self.library.AutoModelForMaskedLM
        self.model = cls.from_pretrained(folder, dtype=self.dtype).to(self.device).eval()
        self.tokenizer = self.Tokenizer.from_pretrained(folder)

    def about(self) -> dict[str, str]:
        return {"version": version("transformers"), "device": str(self.device)}

    def weights_bytes(self) -> int:
        def size(value: Any) -> int:
            if isinstance(value, tuple):  # the packed weight and the bias of a dynamically quantized layer
                return sum(map(size, value))
            return value.numel() * value.element_size() if isinstance(value, self.torch.Tensor) else 0

        return sum(map(size, self.model.state_dict().values()))

    def attend(self, attention: str) -> None:
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)

    def embed(self, sequences: list[str], attention: str, schedule: str) -> Any:
        """In batches of eight "as they arrive" or "by length", or "one at a time"."""
        self.attend(attention)
        order = list(range(len(sequences)))
        if schedule == "by length":
            order.sort(key=lambda i: len(sequences[i]))
        size = 1 if schedule == "one at a time" else BATCH
        means: dict[int, Any] = {}
        with self.torch.inference_mode():
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                texts = [sequences[i] for i in batch]
                inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
                means.update(
                    zip(batch, self._means(self.model.base_model(**inputs).last_hidden_state, texts), strict=True)
                )
            return self._done(self.torch.stack([means[i] for i in range(len(sequences))]))

    def hidden(self, ids: list[list[int]], attention: str) -> Any:
        self.attend(attention)
        with self.torch.inference_mode():
            return self._done(self.model.base_model(self._tensor(ids)).last_hidden_state)

    def contacts(self, ids: list[list[int]], attention: str) -> Any:
        self.attend(attention)
        tokens = self._tensor(ids)
        with self.torch.inference_mode():
            return self._done(self.model.predict_contacts(tokens, self.torch.ones_like(tokens)))

    def trunk(self, length: int, chunk_size: int | None) -> Any:
        """The same."""
        torch = self.torch
        s = torch.tensor(residue_states(length, self.model.config.esmfold_config.trunk.sequence_state_dim))
        zeros, ones = torch.zeros((1, length), dtype=torch.int64), torch.ones((1, length))
        z = torch.zeros((1, length, length, self.model.config.esmfold_config.trunk.pairwise_state_dim))
        self.model.trunk.set_chunk_size(chunk_size)
        arrays = [x.to(self.device) for x in (s, z, zeros, torch.arange(length)[None], ones)]
        with torch.inference_mode():
            return self._done(self.model.trunk(*arrays, no_recycles=0)["s_z"])

    def fold(self, length: int, chunk_size: int | None) -> Any:
        """The same."""
        self.model.trunk.set_chunk_size(chunk_size)
        with self.torch.inference_mode():
            return self._done(self.model(self._tensor(residues(length)), num_recycles=0).positions)

    def train(self, case: str, batches: list[dict[str, Any]], attention: str, lora: bool = False) -> Any:
        """The same."""
        if case != self.case:
            self._begin(case, lora)
            self.attend(attention)
        for batch in batches:
            inputs = {name: self._tensor(value) for name, value in batch.items()}
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model(**inputs).loss
            loss.backward()
            self.optimizer.step()
            self.losses = [*self.losses, self._done(loss.detach())][:2]
        return self.torch.stack(self.losses)

    def _begin(self, case: str, lora: bool) -> None:
        if self.case is not None:
            self.load(self.folder)
        self.case, self.losses = case, []
        if lora:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(self.model, LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS))
        self.model.train()
        # Biases and norms decay as well, which in two steps is not to be seen.
        trained = [x for x in self.model.parameters() if x.requires_grad]
        self.optimizer = self.torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)


class DynamicInt8(Transformers):
    """Its linear layers with weights of 8 bits, and what they are given rounded to 8 bits whenever they run."""

    def load(self, folder: str) -> None:
        super().load(folder)
        linear = {self.torch.nn.Linear}
        self.model = self.torch.ao.quantization.quantize_dynamic(self.model, linear, dtype=self.torch.qint8)


class FairEsm(Torch):
    """ESM-2 only: transformers' names are translated, in this order, as a part of some is the whole of others."""

    def __init__(self, dtype: str):
        super().__init__(dtype)
        from esm.data import FastaBatchedDataset
        from esm.model.esm2 import ESM2

        self.ESM2, self.Dataset = ESM2, FastaBatchedDataset

    def load(self, folder: str) -> None:
        from safetensors.torch import load_file

        from mlx_esm_hf.checkpoint.names import canonical_names, names_in
        from mlx_esm_hf.models.esm.names import FAIR_ESM, TRANSFORMERS_4

        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = SimpleNamespace(**json.load(file))
        published = load_file(os.path.join(folder, "model.safetensors"))
        names = canonical_names(published, (), "esm", [TRANSFORMERS_4], {})
        ours = {name: published[key] for key, name in names.items()}
        state = names_in(FAIR_ESM, ours, config.num_hidden_layers, "esm")
        state["lm_head.weight"] = state["embed_tokens.weight"]
        self.model = self.ESM2(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, "ESM-1b", True)
        self.model.load_state_dict(state)
        self.model.to(self.device, self.dtype).eval()

    def about(self) -> dict[str, str]:
        return {"version": version("fair-esm"), "device": str(self.device)}

    def embed(self, sequences: list[str]) -> Any:
        """As its `extract` does: batches by length, up to a budget of tokens."""
        data = self.Dataset([str(i) for i in range(len(sequences))], sequences)
        convert = self.model.alphabet.get_batch_converter()
        means: dict[int, Any] = {}
        with self.torch.inference_mode():
            for batch in data.get_batch_indices(FAIR_ESM_TOKENS, extra_toks_per_seq=1):
                _, texts, tokens = convert([data[i] for i in batch])
                means.update(zip(batch, self._means(self._hidden(tokens.to(self.device)), texts), strict=True))
            return self._done(self.torch.stack([means[i] for i in range(len(sequences))]))

    def hidden(self, ids: list[list[int]]) -> Any:
        with self.torch.inference_mode():
            return self._done(self._hidden(self._tensor(ids)))

    def contacts(self, ids: list[list[int]]) -> Any:
        with self.torch.inference_mode():
            return self._done(self.model.predict_contacts(self._tensor(ids)))

    def _hidden(self, tokens: Any) -> Any:
        last = self.model.num_layers
        return self.model(tokens, repr_layers=[last])["representations"][last]


class EsmCpp:
    """ESM-2 in float32 on a CPU, on all cores that it may use.

    A sequence at a time: its call for batches returns scores, but no hidden state.
    """

    def __init__(self, dtype: str):
        import esm_cpp

        if dtype != "float32":
            raise ValueError(f"esm-cpp computes in float32, not in {dtype}.")
        self.library = esm_cpp

    def load(self, folder: str) -> None:
        self.model = self.library.Model.load_from_safetensors(os.path.join(folder, "model.safetensors"))
        self.tokenizer = self.library.Tokenizer()

    def about(self) -> dict[str, str]:
        return {"version": version("esm-cpp"), "device": f"cpu, {self.library.current_isa()}"}

    def embed(self, sequences: list[str]) -> np.ndarray:
        return np.stack([self._hidden(self.tokenizer.encode(text))[1:-1].mean(0) for text in sequences])

    def hidden(self, ids: list[list[int]]) -> np.ndarray:
        return np.stack([self._hidden(row) for row in ids])

    def numpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def _hidden(self, ids: list[int]) -> np.ndarray:
        return self.model.forward_with_hidden_states(np.array(ids, np.int32))[1][-1]


PEERS = {
    "ours": Ours,
    "transformers": Transformers,
    "torch's dynamic int8": DynamicInt8,
    "fair-esm": FairEsm,
    "esm-cpp": EsmCpp,
}
