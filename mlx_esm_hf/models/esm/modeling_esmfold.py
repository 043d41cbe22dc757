"""ESMFold in MLX: from a sequence to a structure (Lin et al. 2023; Science, doi:10.1126/science.ade2574)."""

from __future__ import annotations

from typing import Any

from mlx_esm_hf.modeling_outputs import MLXEsmForProteinFoldingOutput
from mlx_esm_hf.models.esm.modeling_esm import MLXEsmPreTrainedModel


class MLXEsmForProteinFolding(MLXEsmPreTrainedModel):
    """An ESM-2 stem, the folding trunk and the structure module."""

    def infer(
        self,
        sequences: str | list[str],
        residx: Any = None,
        masking_pattern: Any = None,
        num_recycles: int | None = None,
        residue_index_offset: int | None = 512,
        chain_linker: str | None = "G" * 25,
    ) -> MLXEsmForProteinFoldingOutput:
        """Fold proteins, `:` between the chains of one."""
        raise NotImplementedError

    @staticmethod
    def output_to_pdb(output: MLXEsmForProteinFoldingOutput) -> list[str]:
        """The PDB file of each protein."""
        raise NotImplementedError
