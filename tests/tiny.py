"""Tiny tokenizers, trained in milliseconds, with the chat templates of well-known model families."""

from dataclasses import dataclass
from typing import Literal, get_args

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Kind = Literal["chatml", "zephyr", "llama3", "mistral", "unprefixed", "plain", "bos"]
KINDS: tuple[Kind, ...] = get_args(Kind)

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. You are a user. You are the system.",
    "How many apples are left? There are 3 apples left. The answer is 3.",
    "Name three colours: red, green and blue. Here are three numbers: 1, 2 and 3.",
    "def add(a, b):\n    return a + b\n\n\n\n",
    "one two three four five six seven eight nine ten\n\n\n\n",
    "### User:\nHello there\n\n### Assistant:\nHello to you too",
    "<|user|>\nWhat is it?\n<|assistant|>\nIt is the answer.\n[INST] What? [/INST] Yes.",
]


@dataclass(frozen=True)
class _Family:
    specials: tuple[str, ...]  # with the ids 0, 1, 2, …
    bos: str | None
    eos: str
    template: str | None
    adds_bos: bool = False  # to plain text
    word_regex: str | None = None  # regex that splits text into words; None is GPT-2's


_FAMILIES: dict[Kind, _Family] = {
    # SmolLM2: BOS starts every message, a newline follows every message, and a conversation without a system message
    # gets one.
    "chatml": _Family(
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        template=(
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    ),
    # Zephyr: role markers are plain text, EOS ends every message, and the tokenizer adds BOS, not the template.
    "zephyr": _Family(
        specials=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        template=(
            "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
            "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
            "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
            "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
            "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
        ),
        adds_bos=True,
    ),
    # Llama 3: <|eot_id|> ends a turn and is not the tokenizer's EOS; template and tokenizer both add BOS. The regex
    # keeps line breaks together, because the generation prompt ends with two.
    "llama3": _Family(
        specials=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        template=(
            "{{ bos_token }}{% for message in messages %}"
            "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
            "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        adds_bos=True,
        word_regex=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    # Mistral: rejects system messages and roles that do not alternate; no token starts a response.
    "mistral": _Family(
        specials=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        template=(
            "{{ bos_token }}{% for message in messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
            "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
            "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
        ),
        adds_bos=True,
    ),
    # Reasoning models: the generation prompt opens a <think> block, which a finished conversation does not contain.
    "unprefixed": _Family(
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos=None,
        eos="<|im_end|>",
        template=(
            "{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
        ),
    ),
    # GPT-2: no template, no BOS.
    "plain": _Family(specials=("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>", template=None),
    # Llama base: no template, BOS added.
    "bos": _Family(specials=("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>", template=None, adds_bos=True),
}


def tiny_tokenizer(kind: Kind = "chatml") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. Special tokens have the lowest ids, in order; the padding token is EOS."""
    family = _FAMILIES[kind]
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.word_regex is None)
    words = [pre_tokenizers.Split(Regex(family.word_regex), "isolated")] if family.word_regex else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in family.specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if family.adds_bos:
        assert family.bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos}:1 $B:1",
            special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))],
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, pad_token=family.eos
    )
    wrapped.chat_template = family.template
    return wrapped
