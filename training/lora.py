"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a generator's projections. Needs peft: `midimamba[lora]`."""

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from midimamba.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# The linear layers that are called. A mixer reads the weights of dt_proj and conv1d, a router its own: an adapter
# beside those would be trained and never asked. The head is tied to the embeddings, which cannot have its adapter.
ADAPTABLE = frozenset(
    {"in_proj", "x_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
)


@dataclass
class LoraArguments:
    """Low-rank adapters instead of the whole generator. What is saved at the end is the whole model, with the adapters
    merged in."""

    use_peft: bool = field(default=False, metadata={"help": "Train low-rank adapters (LoRA), not the generator."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(
        default=32, metadata={"help": "The adapters' outputs are multiplied by lora_alpha/lora_r."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Projections to adapt; unset: all, of a Mamba in_proj, x_proj and out_proj."}
    )


def lora_config(arguments: LoraArguments) -> "LoraConfig | None":
    """What the flags ask for.

    Raises:
        InputError: if peft is not installed, or refuses the numbers.
    """
    if not arguments.use_peft:
        return None
    if not is_peft_available():
        raise InputError("use_peft needs peft: pip install 'midimamba[lora]'")
    from peft import LoraConfig

    try:
        # Without dropout: the probabilities that are reinforced are those that were sampled from.
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.lora_target_modules,
        )
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


def add_adapters(model: PreTrainedModel, config: "LoraConfig") -> "PeftModel":
    """The model with adapters, which alone need a gradient. Its layers are replaced in place.

    Args:
        model (`PreTrainedModel`): the generator.
        config (`LoraConfig`): its `target_modules` are names of projections; by default all that can be adapted.

    Raises:
        InputError: for anything that an adapter would have no effect on, or that [`merged`] would not merge.
    """
    from peft import get_peft_model

    possible = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    possible &= ADAPTABLE
    targets = possible if config.target_modules is None else config.target_modules
    refused = {targets} if isinstance(targets, str) else set(targets) - possible
    if refused or not targets:
        raise InputError(
            f"lora_target_modules is {', '.join(sorted(refused)) or 'empty'}, but adapters have an effect "
            f"on {', '.join(sorted(possible))} alone"
        )
    if config.modules_to_save or config.target_parameters:
        raise InputError("modules_to_save and target_parameters are not supported: adapt projections alone")
    config = copy.deepcopy(config)
    config.target_modules = sorted(targets)
    return get_peft_model(model, config)


def without_wrapper(model: nn.Module) -> PreTrainedModel:
    """The generator itself, which has the adapters in its layers, if there are any."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore
    return inner


def merged(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy of a generator with its adapters added to its weights; it has the modules of a plain generator again.

    Without adapters, the generator itself.
    """
    if not is_peft_available():
        return policy
    from peft.tuners.lora import LoraLayer

    if not any(isinstance(module, LoraLayer) for module in policy.modules()):
        return policy
    whole = copy.deepcopy(policy)
    for name, module in list(whole.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            whole.set_submodule(name, module.get_base_layer())
    del whole.peft_config
    return whole.requires_grad_(True)
