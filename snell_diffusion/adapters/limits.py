"""Limits of format 1. A file beyond any of them is refused before its body is read."""

import re

FORMAT = "1.2"  # the newest that is read and written
PLAIN_FORMAT = "1.0"  # what is written where nothing needs a later one
WEIGHTS_NAME = "pytorch_snella_weights.safetensors"

MAX_HEADER_BYTES = 4 * 2**20
MAX_FILE_BYTES = 4 * 2**30
MAX_HEADER_VALUES = 2**17  # commas in the container's header; 16,384 tensors take 120,000
MAX_FIELDS = 2**16  # commas in our own header; 4,096 layers take 37,000
MAX_TENSORS = 16_384
MAX_LAYERS = 4_096  # over all components
MAX_COMPONENTS = 16
MAX_RANK = 1_024
MAX_HEADS = 64
MAX_FEATURES = 2**20  # inputs or outputs of one layer
# Heads times entries of one update: its distances take 4 bytes for each while they are summed.
MAX_DISTANCES = 2**30
MAX_STRING = 256
MAX_PROMPT = 2_048  # instance and class prompts, the only long texts
MAX_METADATA = 64  # entries
MAX_WORDS = 64  # new words of an adapter
MAX_VECTORS = 32  # embeddings that one word stands for
MAX_TOKENS = 256  # embeddings of all words
MAX_KERNEL = 64  # rows or columns of a convolution's kernel
MAX_SETTING = 256  # numbers of a layer's tensors other than its factors
MAX_LAYER_TENSORS = 16  # of one layer, where the table lists them
MAX_DIMENSIONS = 4  # of one tensor, where the table lists it
MAX_UNPACKED = 2**30  # numbers of an adapter that a file packs into fewer bits

# What a file must not change, whatever it says: it would switch off what the owner switched on.
NEVER_ADAPTED = frozenset({"safety_checker"})

# An update larger than this many times the base weight (Frobenius norms, per layer) is taken for a
# damaged or hostile file. Trained adapters stay below 1; the bound is far above any useful one.
MAX_RELATIVE_UPDATE = 100.0
# Base weights below this root mean square (zero-initialised layers) count as this large.
MIN_BASE_RMS = 1e-3
# Base weights that cannot be read (quantized) count as this large, far above any trained weight.
UNKNOWN_BASE_RMS = 1.0

# Fixed patterns of our own, never taken from a file; each is linear in the length of its input.
COMPONENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# Dashes for Z-Image, whose embedders are called "2-1" after their patch sizes.
MODULE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_][A-Za-z0-9_-]*)*")
ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
FIELD_TENSOR = re.compile(r"[a-z][A-Za-z0-9_]{0,63}")
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
# Brackets, so that no word is part of another or of ordinary text.
WORD = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_.-]{0,61}>")
WRITER = re.compile(r"snell_diffusion ([0-9]{1,4}(?:\.[0-9]{1,4}){1,2})[a-z0-9.+]{0,32}")
VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
