"""Small tokenizers with the normalizer, splitting, model, decoder and special tokens of each family's.

They are saved by transformers, with the template of tests/chat_templates/families, which was written for these tests in
the family's format with the constructs that the models' own templates use.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from test_text_cuts import DEEPSEEK, LLAMA, O200K, QWEN, byte_level, source, split
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

FAMILY_TEMPLATES = Path(__file__).parent / "chat_templates" / "families"
LANGUAGES = "naïve Ελλάδα слово 漢字かな １２３ Zürich Città مرحبا"
QWEN35 = QWEN.replace(r"\p{L}+", r"[\p{L}\p{M}]+", 1).replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KIMI = r"[\p{Han}]+|" + O200K.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]")
SPACES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
LLAMA_SPACES = decoders.Sequence([SPACES, decoders.Strip(" ", 1, 0)])
PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@dataclass(frozen=True)
class Family:
    splits: tuple | None  # steps before bytes become letters; None for a vocabulary of words with ▁ for a space
    eos: str
    special: tuple[str, ...]  # beside eos and bos
    added: tuple[str, ...] = ()  # tokens that are text
    bos: str | None = None
    normalizer: object = None
    pre_tokenizer: object = None  # without splits
    decoder: object = SPACES  # without splits
    adds_bos: bool = False  # to every text that is not a conversation
    ignore_merges: bool = False


CHATML = ("<|im_start|>", "<|im_end|>")
THINK, TOOL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
FAMILIES = {
    "qwen3_moe": Family((split(QWEN),), "<|im_end|>", CHATML, (*THINK, *TOOL), normalizer=normalizers.NFC()),
    "qwen3_5_moe": Family((split(QWEN35),), "<|im_end|>", CHATML, (*THINK, *TOOL), normalizer=normalizers.NFC()),
    "gpt_oss": Family(
        (split(O200K),), "<|return|>", ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
        bos="<|startoftext|>", ignore_merges=True,
    ),
    "gemma4": Family(
        None, "<eos>", ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|think|>", '<|"|>'),
        bos="<bos>", normalizer=normalizers.Replace(" ", "▁"), adds_bos=True,
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
    ),
    "glm4_moe": Family(
        (split(LLAMA),), "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        (*THINK, *TOOL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
    ),
    "deepseek_v3": Family(
        tuple(map(split, DEEPSEEK)), "<｜end▁of▁sentence｜>", (),
        (*THINK, "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>"),
        bos="<｜begin▁of▁sentence｜>", adds_bos=True,
    ),
    "deepseek_v32": Family(
        tuple(map(split, DEEPSEEK)), "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), THINK,
        bos="<｜begin▁of▁sentence｜>", adds_bos=True,
    ),
    "deepseek_v4": Family(
        tuple(map(split, DEEPSEEK)), "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"),
        (*THINK, "｜DSML｜", "<｜latest_reminder｜>"), bos="<｜begin▁of▁sentence｜>", adds_bos=True,
    ),
    "minimax_m2": Family((split(LLAMA),), "[e~[", ("]~b]", "]~!b["), (*THINK, "<minimax:tool_call>")),
    "kimi": Family(
        (split(KIMI),), "<|im_end|>", ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
        (*THINK, "<|tool_calls_section_begin|>"), bos="[BOS]",
    ),
    "mixtral": Family(
        None, "</s>", ("[INST]", "[/INST]"), bos="<s>", normalizer=PREPENDED, decoder=LLAMA_SPACES, adds_bos=True
    ),
    "mistral": Family(
        (split(O200K),), "</s>",
        ("[INST]", "[/INST]", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "[SYSTEM_PROMPT]"),
        bos="<s>", adds_bos=True, ignore_merges=True,
    ),
    "granite": Family(
        (pre_tokenizers.Digits(individual_digits=True), split(GPT2)),
        "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"), TOOL,
    ),
    "ernie4_5_moe": Family(
        None, "</s>", ("<|begin_of_sentence|>", "<|end_of_sentence|>"), THINK, bos="<s>",
        normalizer=normalizers.Replace(" ", "▁"),
    ),
    "hunyuan_v1_moe": Family((split(QWEN),), "<|eos|>", ("<|startoftext|>", "<|extra_0|>", "<|extra_4|>"), THINK),
    "lfm2_moe": Family(
        (split(LLAMA),), "<|im_end|>", (*CHATML, "<|tool_call_start|>", "<|tool_call_end|>"), THINK,
        bos="<|startoftext|>", adds_bos=True,
    ),
    "nemotron_h": Family((split(O200K),), "<|im_end|>", (*CHATML, *THINK), TOOL, bos="<s>", ignore_merges=True),
}  # fmt: skip


def backend_of(family: Family) -> Backend:
    """Train a tokenizer."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if family.splits else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.pre_tokenizer = byte_level(*family.splits) if family.splits else pre_tokenizers.Metaspace()
    trained.train_from_iterator([source(), LANGUAGES], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], list(map(tuple, model["merges"]))
    if family.splits:
        backend = Backend(models.BPE(vocab, merges, ignore_merges=family.ignore_merges))
        backend.pre_tokenizer, backend.decoder = byte_level(*family.splits), decoders.ByteLevel()
    else:
        for token in ["▁", *(f"<0x{byte:02X}>" for byte in range(256))]:
            vocab.setdefault(token, len(vocab))
        backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.decoder = family.decoder
        if family.pre_tokenizer is not None:
            backend.pre_tokenizer = family.pre_tokenizer
    if family.normalizer is not None:
        backend.normalizer = family.normalizer
    special = dict.fromkeys(one for one in (family.bos, family.eos, *family.special) if one)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in family.added])
    if family.adds_bos:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(f"{family.bos} $A", special_tokens=[bos])
    return backend


def write_tokenizer(name: str, directory: Path) -> Path:
    """Write a family's tokenizer, with its chat template, as transformers saves it."""
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    template = (FAMILY_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    saved = PreTrainedTokenizerFast(
        tokenizer_object=backend_of(family), bos_token=family.bos, eos_token=family.eos, chat_template=template
    )
    saved.save_pretrained(directory)
    return directory
