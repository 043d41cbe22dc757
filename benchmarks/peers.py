"""The peers: one class per library, which a worker process uses.

All classes have the same methods, except where a library lacks a feature: `load` reads a checkpoint, each of the others
computes one workload and returns when it is done, also on a GPU. The constructor imports the library, so a worker
contains only its own. Embeddings are means of the last hidden state over the residues of a protein.
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
FAIR_ESM_TOKENS = 4096  # the default of fair-esm's `extract`
COMPARED = 16  # tokens of a product whose values are compared


def cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@functools.lru_cache(2)
def matrix(rows: int, columns: int) -> np.ndarray:
    """Return a random matrix, always the same."""
    return np.random.default_rng(0).random((rows, columns), np.float32) - np.float32(0.5)


def product_operands(tokens: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and w of a linear layer x · wᵀ."""
    return matrix(tokens, inputs), matrix(outputs, inputs)


def gemm_operands(rows: int, length: int, hidden: int, heads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs x, w whose products x · wᵀ are those of one encoder layer: six linear layers, scores, contexts."""
    random, size = np.random.default_rng(0), hidden // heads
    linear = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
    attention = [(length, size), (size, length)]
    shapes = [((rows * length, i), (o, i)) for o, i in linear]
    shapes += [((rows, heads, length, i), (rows, heads, o, i)) for o, i in attention]
    return [(random.standard_normal(x, np.float32), random.standard_normal(w, np.float32)) for x, w in shapes]


def residues(length: int) -> list[list[int]]:
    """Return a random protein for folding, as indices of the twenty amino acids."""
    return np.random.default_rng(0).integers(0, 20, (1, length)).tolist()


def residue_states(length: int, width: int) -> np.ndarray:
    """Return random states of a language model for a protein, [1, length, width]."""
    return np.random.default_rng(0).standard_normal((1, length, width), np.float32)


def model_class(folder: str) -> str:
    """Return the name of the class of a checkpoint, as in transformers."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    if config["model_type"] == "esmfold2":
        return "EsmFold2Model"
    return "EsmForProteinFolding" if config.get("is_folding_model") else "AutoModelForMaskedLM"


def pair_states(length: int, width: int) -> np.ndarray:
    """Return random states of pairs, [1, length, length, width]."""
    return np.random.default_rng(0).standard_normal((1, length, length, width), np.float32)


def noisy_atoms(samples: int, atoms: int) -> np.ndarray:
    """Return random positions of atoms, [samples, atoms, 3], in Å."""
    return 10 * np.random.default_rng(1).standard_normal((samples, atoms, 3), np.float32)


SEQUENCE = "ACDEFGHIKLMNPQRSTVWY"  # repeated, for the atoms of ESMFold2
NOISE = 5.0  # in Å


class Ours:
    """This library."""

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
        self.model = getattr(self.library, f"MLX{model_class(folder)}").from_pretrained(folder, dtype=self.dtype)
        self.conditioning: dict[int, Any] = {}
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
        """Return the pair states after one pass of a folding trunk."""
        mx = self.mx
        s = mx.array(residue_states(length, self.model.config.esmfold_config.trunk.sequence_state_dim))
        zeros, ones = mx.zeros((1, length), dtype=mx.int32), mx.ones((1, length), dtype=mx.int32)
        return self._done(self.model.trunk(s, zeros, mx.arange(length)[None], ones, 0)["s_z"])

    def read_weights(self) -> None:
        """Read all weights, so that their memory counts."""
        self.mx.eval([x.sum() for _, x in self.model.named_parameters()])

    def pair_trunk(self, length: int) -> Any:
        """Return the pair states after the layers of ESMFold2's trunk."""
        z = self.mx.array(pair_states(length, self.model.config.pairwise_hidden_size))
        return self._done(self.model.folding_trunk(z, self.mx.ones((1, length))))

    def denoise(self, length: int, samples: int) -> Any:
        """Return the atoms after one call of ESMFold2's denoiser, with the conditioning of an earlier call."""
        mx, head = self.mx, self.model.structure_head
        features = self.model.features((SEQUENCE * length)[:length])
        if length not in self.conditioning:
            z = mx.array(pair_states(length, self.model.config.pairwise_hidden_size))
            singles = mx.array(residue_states(length, self.model.config.single_inputs_size))
            self.conditioning[length] = head.prepare(z, z, singles, features)
        x = mx.array(noisy_atoms(samples, features["ref_pos"].shape[1]))
        real = int(features["atom_attention_mask"].sum())
        return self._done(head(x, mx.array([NOISE]), self.conditioning[length])[:, :real])

    def fold(self, length: int) -> Any:
        """Return the atoms of a protein after one pass."""
        return self._done(self.model(self.mx.array(residues(length)), num_recycles=0).positions)

    def train(self, case: str, batches: list[dict[str, Any]], lora: bool = False) -> Any:
        """Do a step of AdamW for each batch. A case starts from the checkpoint's weights.

        Returns the losses of the first two steps, since the number of warm-up steps depends on the time they take.
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
        """Run multiply-adds on registers only, in the kernels' instruction set."""
        from mlx_esm_hf.ops import kernels

        kernels.native.multiply_adds(operations)

    def product(self, shape: list[int], repeats: int, blas: bool = False) -> Any:
        """Compute a linear layer with our kernel or, with `blas`, with MLX's matrix product; return the first tokens.

        Args:
            shape: tokens, inputs and outputs.
            repeats: number of products.
            blas: whether to use MLX's matrix product.
        """
        mx = self.mx
        if self.product_of != shape:
            self.product_of, self.x, self.w = shape, *map(mx.array, product_operands(*shape))
            mx.eval(self.x, self.w)
        x, w = self.x, self.w
        done = [x @ w.T if blas else self.ops.linear(x, w) for _ in range(repeats)]
        mx.eval(done)
        return done[0][:COMPARED]

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
    """The common part of transformers and fair-esm."""

    def __init__(self, dtype: str):
        import torch

        torch.set_num_threads(len(cores()))
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.product_of: list[int] | None = None

    def product(self, shape: list[int], repeats: int) -> Any:
        """Compute the same with torch."""
        if self.product_of != shape:
            self.product_of, self.x, self.w = shape, *map(self.torch.from_numpy, product_operands(*shape))
        with self.torch.inference_mode():
            for _ in range(repeats):
                done = self.torch.nn.functional.linear(self.x, self.w)
        return done[:COMPARED]

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
    """transformers on torch."""

    def __init__(self, dtype: str):
        super().__init__(dtype)
        import transformers

        self.library, self.Tokenizer = transformers, transformers.AutoTokenizer

    def load(self, folder: str) -> None:
        self.folder, self.case = folder, None
        cls = getattr(self.library, model_class(folder))
        self.model = cls.from_pretrained(folder, dtype=self.dtype).to(self.device).eval()
        self.conditioning: dict[tuple[int, int], Any] = {}
        self.tokenizer = self.Tokenizer.from_pretrained(folder)

    def about(self) -> dict[str, str]:
        return {"version": version("transformers"), "device": str(self.device)}

    def weights_bytes(self) -> int:
        def size(value: Any) -> int:
            if isinstance(value, tuple):  # weight and bias of a dynamically quantized layer
                return sum(map(size, value))
            return value.numel() * value.element_size() if isinstance(value, self.torch.Tensor) else 0

        return sum(map(size, self.model.state_dict().values()))

    def attend(self, attention: str) -> None:
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)

    def embed(self, sequences: list[str], attention: str, schedule: str) -> Any:
        """Embed in batches of eight, "as they arrive" or "by length", or "one at a time"."""
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
        """Return the pair states after one pass of a folding trunk."""
        torch = self.torch
        s = torch.tensor(residue_states(length, self.model.config.esmfold_config.trunk.sequence_state_dim))
        zeros, ones = torch.zeros((1, length), dtype=torch.int64), torch.ones((1, length))
        z = torch.zeros((1, length, length, self.model.config.esmfold_config.trunk.pairwise_state_dim))
        self.model.trunk.set_chunk_size(chunk_size)
        arrays = [x.to(self.device) for x in (s, z, zeros, torch.arange(length)[None], ones)]
        with torch.inference_mode():
            return self._done(self.model.trunk(*arrays, no_recycles=0)["s_z"])

    def read_weights(self) -> None:
        """Read all weights, so that their memory counts."""
        for parameter in self.model.parameters():
            parameter.sum()

    def pair_trunk(self, length: int, chunk_size: int | None) -> Any:
        """Return the pair states after the layers of ESMFold2's trunk."""
        torch = self.torch
        for module in self.model.folding_trunk.modules():
            if hasattr(module, "chunk_size"):
                module.chunk_size = chunk_size
        z = torch.tensor(pair_states(length, self.model.config.pairwise_hidden_size)).to(self.device)
        with torch.inference_mode():
            return self._done(self.model.folding_trunk(z, torch.ones(1, length, length, device=self.device)))

    def denoise(self, length: int, samples: int) -> Any:
        """Return the atoms after one call of ESMFold2's denoiser, with the conditioning of an earlier call."""
        from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs
        from transformers.models.esmfold2.protein_utils import prepare_protein_features

        torch, head, one_hot = self.torch, self.model.structure_head, self.torch.nn.functional.one_hot
        given = prepare_protein_features((SEQUENCE * length)[:length], device=self.device)
        atoms = {name: given[name] for name in EsmFold2AtomInputs.__dataclass_fields__}
        atoms["ref_element"] = one_hot(atoms["ref_element"], 128).float()
        atoms["ref_atom_name_chars"] = one_hot(atoms["ref_atom_name_chars"], 64).float()
        with torch.inference_mode():
            if (length, samples) not in self.conditioning:
                z = torch.tensor(pair_states(length, self.model.config.pairwise_hidden_size)).to(self.device)
                singles = torch.tensor(residue_states(length, self.model.config.single_inputs_size)).to(self.device)
                self.conditioning[length, samples] = head.prepare_conditioning(
                    EsmFold2AtomInputs(**atoms), z, z, singles, given["attention_mask"], samples
                )
            x = torch.tensor(noisy_atoms(samples, atoms["ref_pos"].shape[1])).to(self.device)
            levels = torch.full((samples,), NOISE, device=self.device)
            real = int(given["atom_attention_mask"].sum())
            return self._done(head(x, levels, self.conditioning[length, samples])[:, :real])

    def fold(self, length: int, chunk_size: int | None) -> Any:
        """Return the atoms of a protein after one pass."""
        self.model.trunk.set_chunk_size(chunk_size)
        with self.torch.inference_mode():
            return self._done(self.model(self._tensor(residues(length)), num_recycles=0).positions)

    def train(self, case: str, batches: list[dict[str, Any]], attention: str, lora: bool = False) -> Any:
        """Do a step of AdamW for each batch, as `Ours.train` does."""
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
        # Unlike ours, this also decays biases and norms, which makes no visible difference in two steps.
        trained = [x for x in self.model.parameters() if x.requires_grad]
        self.optimizer = self.torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)


class DynamicInt8(Transformers):
    """transformers with dynamic quantization: linear layers with 8-bit weights and 8-bit activations."""

    def load(self, folder: str) -> None:
        super().load(folder)
        linear = {self.torch.nn.Linear}
        self.model = self.torch.ao.quantization.quantize_dynamic(self.model, linear, dtype=self.torch.qint8)


class FairEsm(Torch):
    """fair-esm, for ESM-2 only."""

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
        """Embed like fair-esm's `extract`: batches by length, with a maximum number of tokens."""
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
    """esm-cpp: ESM-2 in float32 on all available CPU cores.

    It computes one sequence at a time, since its function for batches does not return hidden states.
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
