"""Recurrent networks as Hugging Face models: `import hf_rnn` registers them with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from .attention import ATTENTION_SCORES
from .configuration_rnn import RNNConfig
from .configuration_rnn_seq2seq import RNNSeq2SeqConfig
from .modeling_rnn import (
    RNNForCausalLM,
    RNNForMaskedLM,
    RNNForMultipleChoice,
    RNNForQuestionAnswering,
    RNNForSequenceClassification,
    RNNForTokenClassification,
    RNNModel,
)
from .modeling_rnn_seq2seq import RNNSeq2SeqForConditionalGeneration, RNNSeq2SeqModel
from .recurrent_cells import RECURRENT_CELLS
from .recurrent_layer import loop_only


__version__ = "0.1.0"

# Configuration, then each class with the Auto classes that find it; the first of them is the one that a checkpoint with
# its own code names. Registration, `__all__` and the test matrix are made from this.
REGISTRATION = {
    RNNConfig: {
        RNNModel: (AutoModel, AutoModelForTextEncoding),
        RNNForCausalLM: (AutoModelForCausalLM,),
        RNNForMaskedLM: (AutoModelForMaskedLM,),
        RNNForSequenceClassification: (AutoModelForSequenceClassification,),
        RNNForTokenClassification: (AutoModelForTokenClassification,),
        RNNForQuestionAnswering: (AutoModelForQuestionAnswering,),
        RNNForMultipleChoice: (AutoModelForMultipleChoice,),
    },
    RNNSeq2SeqConfig: {
        RNNSeq2SeqModel: (AutoModel,),
        RNNSeq2SeqForConditionalGeneration: (AutoModelForSeq2SeqLM,),
    },
}


def _saved_name(saved_class: type) -> str:
    return f"{saved_class.__module__.split('.')[-1]}.{saved_class.__name__}"


def _register() -> None:
    for config_class, model_classes in REGISTRATION.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        heads = {"AutoConfig": _saved_name(config_class)}
        for model_class, auto_classes in model_classes.items():
            model_class.register_for_auto_class(auto_classes[0])
            model_class._heads = heads
            for auto_class in auto_classes:
                auto_class.register(config_class, model_class, exist_ok=True)
                heads[auto_class.__name__] = _saved_name(model_class)


_register()

__all__ = ["ATTENTION_SCORES", "RECURRENT_CELLS", "REGISTRATION", "loop_only"] + [
    name.__name__ for config_class, classes in REGISTRATION.items() for name in (config_class, *classes)
]
