"""The public names, listed here and nowhere else: `__init__.py` imports each from its module on first use."""

# ruff: noqa: F401
# Modules of the package, which are imported on first use as well.
import mlx_esm_hf.data as data
import mlx_esm_hf.errors as errors
import mlx_esm_hf.hub as hub
import mlx_esm_hf.jobs as jobs
import mlx_esm_hf.models as models
import mlx_esm_hf.pipelines as pipelines
import mlx_esm_hf.plots as plots
import mlx_esm_hf.quantization as quantization
import mlx_esm_hf.runs as runs
import mlx_esm_hf.runtime as runtime
import mlx_esm_hf.training as training

from .data.source import read_proteins as read_proteins
from .demo import demo_model as demo_model
from .jobs.contacts import contacts as contacts
from .jobs.embed import embed as embed
from .jobs.fill_mask import fill_mask as fill_mask
from .jobs.fold import fold as fold
from .jobs.generate import generate as generate
from .jobs.perplexity import perplexity as perplexity
from .jobs.protein_model import load_protein_model as load_protein_model
from .jobs.score import score as score
from .models.auto import MLXAutoModel as MLXAutoModel
from .models.auto import MLXAutoModelForMaskedLM as MLXAutoModelForMaskedLM
from .models.auto import MLXAutoModelForSequenceClassification as MLXAutoModelForSequenceClassification
from .models.auto import MLXAutoModelForTokenClassification as MLXAutoModelForTokenClassification
from .models.esm.configuration_esm import MLXEsm1Config as MLXEsm1Config
from .models.esm.configuration_esm import MLXEsmConfig as MLXEsmConfig
from .models.esm.modeling_esm import MLXEsmForMaskedLM as MLXEsmForMaskedLM
from .models.esm.modeling_esm import MLXEsmForSequenceClassification as MLXEsmForSequenceClassification
from .models.esm.modeling_esm import MLXEsmForTokenClassification as MLXEsmForTokenClassification
from .models.esm.modeling_esm import MLXEsmModel as MLXEsmModel
from .models.esm.modeling_esm import MLXEsmPreTrainedModel as MLXEsmPreTrainedModel
from .models.esm.tokenization_esm import Esm1Tokenizer as Esm1Tokenizer
from .models.esm.tokenization_esm import EsmTokenizer as EsmTokenizer
from .models.esmc.configuration_esmc import MLXEsmcConfig as MLXEsmcConfig
from .models.esmc.modeling_esmc import MLXEsmcForMaskedLM as MLXEsmcForMaskedLM
from .models.esmc.modeling_esmc import MLXEsmcForSequenceClassification as MLXEsmcForSequenceClassification
from .models.esmc.modeling_esmc import MLXEsmcForTokenClassification as MLXEsmcForTokenClassification
from .models.esmc.modeling_esmc import MLXEsmcModel as MLXEsmcModel
from .models.esmc.modeling_esmc import MLXEsmcPreTrainedModel as MLXEsmcPreTrainedModel
from .models.esmc.tokenization_esmc import EsmcTokenizer as EsmcTokenizer
from .models.esmfold.modeling_esmfold import MLXEsmForProteinFolding as MLXEsmForProteinFolding
from .models.esmfold2.configuration_esmfold2 import MLXEsmFold2Config as MLXEsmFold2Config
from .models.esmfold2.modeling_esmfold2 import MLXEsmFold2Model as MLXEsmFold2Model
from .pipelines import pipeline as pipeline
from .quantization.convert import convert as convert
from .runtime.seeds import set_seed as set_seed
from .training.adapters import LoraConfig as LoraConfig
from .training.adapters import add_adapters as add_adapters
from .training.adapters import load_adapter as load_adapter
from .training.adapters import merge_adapters as merge_adapters
from .training.adapters import save_adapter as save_adapter
from .training.arguments import MLXTrainingArguments as MLXTrainingArguments
from .training.trainer import MLXTrainer as MLXTrainer
from .version import __version__ as __version__
