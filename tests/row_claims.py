"""What each reliability row claims, how many cases prove it, and what runs them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One row of the table in docs/reliability.md.

    Attributes:
        claim: What users are promised.
        how: What the test does.
        files: What runs it, after `pytest`.
        count: Cases in every run of the suite.
        full_count: Cases of the slow tier.
        may_skip: Whether cases may be skipped, with a reason, where something is not installed.
    """

    claim: str
    how: str
    files: str
    count: int = 0
    full_count: int = 0
    may_skip: bool = False


_KILL = "tests/reliability/test_kill.py"
_DAMAGED = "tests/reliability/test_damaged_checkpoint.py"
_CORPUS = "tests/security/test_adapter_corpus.py"

ROWS = {
    "R1": Claim(
        "A run that dies anywhere can be resumed to the same file, bit for bit",
        "the process exits at 12 named points of the first or a later checkpoint, then resumes",
        _KILL,
        24,
    ),
    "R2": Claim(
        "... also if it is killed at any moment",
        "SIGKILL at uniformly random times, then resume",
        _KILL,
        12,
        60,
    ),
    "R3": Claim(
        "Ctrl-C and SIGTERM save the state and exit 130 or 143",
        "SIGTERM, SIGINT, SIGTERM twice, SIGTERM during a save; then resume",
        "tests/reliability/test_signals.py",
        4,
    ),
    "R4": Claim(
        "A damaged checkpoint is never continued from; `latest` steps back and says why",
        "5 files x missing, half, empty, bit flip, from another step; a planted pickle",
        _DAMAGED,
        26,
    ),
    "R5": Claim(
        "A resume in the middle of an epoch is exact",
        "accumulation x workers x text encoder x augmentation; a chain of 5 resumes",
        "tests/reliability/test_resume_exact.py",
        17,
    ),
    "R6": Claim(
        "A full disk costs no earlier checkpoint and is named as the cause",
        "file-size limits, a full file system, a read-only folder",
        "tests/reliability/test_disk.py",
        6,
        may_skip=True,
    ),
    "R7": Claim(
        "NaN stops the run before the update, exits 3, and reaches no file",
        "injected in loss, gradient, weight, latents, text, picture; 16 bit; learning rate 1e30",
        "tests/reliability/test_nonfinite.py",
        9,
    ),
    "R8": Claim(
        "A resume with other settings is refused field by field, or on the documented list",
        "rank, learning rate, targets, photos, base, seed, precision, process count changed",
        _DAMAGED.replace("damaged_checkpoint", "changed_settings"),
        8,
    ),
    "X": Claim(
        "The same settings give the same file",
        "repeat, workers, PYTHONHASHSEED, checkpoints, pictures; threads within 1e-5",
        "tests/reliability/test_determinism.py",
        8,
    ),
    "A1": Claim(
        "Every hostile adapter file is refused with file, field and next step",
        "23 container, 24 tensor, 20 header and 5 architecture faults; texts kept as a snapshot",
        _CORPUS,
        72,
    ),
    "A2": Claim(
        "No damaged byte goes unnoticed",
        "seeded mutations of 8 kinds: refused, or the tensors are bit-equal",
        "tests/security/test_mutations.py",
        4_000,
        100_000,
    ),
    "A3": Claim(
        "A refused file leaves the pipeline as it was",
        "72 files x 3 pipelines: modules, bytes, hooks, random state and picture compared",
        "tests/security/test_untouched.py",
        216,
    ),
    "A4": Claim(
        "Refusing any file up to 100 MB takes at most 2 s of CPU and 300 MB",
        "8 expensive files, in a process limited to 4 GB",
        "tests/security/test_cost.py",
        8,
    ),
    "A5": Claim(
        "No name or link leads out of the folder that was given",
        "traversal, links, pipes, devices; an audit hook watches every open",
        "tests/security/test_paths.py",
        9,
    ),
    "A6": Claim(
        "Any order of load, set, fuse, unload leaves the base bit-equal",
        "11 adapter names, duplicates, 200 random orders",
        "tests/security/test_names.py",
        212,
    ),
    "V1": Claim(
        "Adapters of every release load and predict the same",
        "files kept since each release: tensors bit-equal, predictions within 1e-4",
        "tests/compat/test_golden_adapters.py",
        4,
    ),
    "V2": Claim(
        "Other format versions are read, migrated or refused by name",
        "later minor and major version, unknown feature, none, version 0",
        "tests/compat/test_versions.py",
        6,
    ),
    "V5": Claim(
        "A library that is too old is named at import",
        "each dependency faked one version below its floor",
        "tests/compat/test_floors.py",
        6,
    ),
    "I": Claim(
        "Every photo is checked before a model loads; no output carries EXIF",
        "21 kinds of bad files refused by name, 9 kinds normalised to upright RGB",
        "tests/security/test_images.py",
        30,
    ),
    "D0": Claim(
        "A launch that starts something else than was asked for is refused",
        "the four launch commands that silently start another topology",
        "tests/distributed/test_launch.py",
        4,
    ),
    "D1": Claim(
        "2 processes train what 1 trains, within 1e-6",
        "data parallel, gloo: even and uneven photos, accumulation 2; repeats bit-equal",
        "tests/distributed/test_replicated.py",
        3,
    ),
    "D2": Claim(
        "All processes allocate the same budget, or all stop",
        "digests compared at every allocation, with ties; one process made to differ",
        "tests/distributed/test_allocation.py",
        4,
    ),
    "D3": Claim(
        "A run can be resumed on another number of processes",
        "2 to 2 bit-identical; 2 to 1 and 1 to 2 within 1e-6",
        "tests/distributed/test_resume.py",
        3,
    ),
    "D4": Claim(
        "A sharded base (FSDP2) trains the same adapter, within 1e-6",
        "fully_shard, gloo, 2 processes against 1; checkpoint of 2 on 1; whole-matrix thresholds",
        "tests/distributed/test_fsdp.py",
        4,
    ),
    "D5": Claim(
        "DeepSpeed ZeRO-1, 2 and 3 train the same adapter, within 1e-6",
        "2 processes against 1 on the CPU",
        "tests/distributed/test_zero.py",
        full_count=3,
        may_skip=True,
    ),
    "D6": Claim(
        "If one process dies, all end within 60 s and the newest checkpoint is valid",
        "one rank killed in a step and in a save; one raises",
        "tests/distributed/test_failures.py",
        3,
    ),
    "D7": Claim(
        "Only the first process writes; NaN on one process stops all at the same step",
        "files compared between 1 and 2 processes; NaN planted on rank 1",
        "tests/distributed/test_failures.py",
        2,
    ),
    "G5": Claim(
        "Where disk or memory ends, a run says so, and the page goes on answering",
        "quota, disk full at the start and while training, address space, CUDA, killed; page timed",
        "tests/app/test_scarce.py",
        6,
    ),
    "G9": Claim(
        "Whatever is killed, a run is shown as it is and resumed to the same file, bit for bit",
        "SIGKILL of the trainer at 6 moments, then of the server; then a new server resumes",
        "tests/app/test_killed.py",
        2,
        5,
    ),
    "G1": Claim(
        "A crowd is served in turn, everybody else is told at once that the queue is full",
        "3 rounds of 32 clients at once, 0.5 s each, queue of 8, while a run trains",
        "tests/app/test_crowd.py",
        96,
    ),
    "G4": Claim(
        "A hostile request gets a sentence: nothing outside is read, written or told",
        "file addresses, server paths, SSRF forms, names, numbers, forged ids, huge and deep JSON",
        "tests/app/test_hostile.py",
        42,
    ),
    "G6": Claim(
        "Nobody reaches another user's photos, runs, adapters, files or sessions",
        "two people signed in; one has the other's ids and addresses",
        "tests/app/test_strangers.py",
        12,
    ),
    "G7": Claim(
        "A server that runs for long stays as it is",
        "jobs of all kinds over HTTP: descriptors, threads, files within 2, memory within 50 MB",
        "tests/app/test_endurance.py",
        20,
        200,
    ),
    "G8": Claim(
        "Pages of other sites get nothing done",
        "foreign, empty and other-port Origin, rebound Host, cross-site picture: all 403",
        "tests/app/test_strangers.py",
        6,
    ),
    "G2": Claim(
        "Whoever cancels or vanishes frees the worker within 2 s and blocks nobody",
        "queued, loading, stepping, between pictures, storing an upload; button and dropped line",
        "tests/app/test_cancel.py",
        10,
    ),
    "G3": Claim(
        "Many at once draw bit for bit what each would draw alone",
        "6 threads x 3 pictures, 20 loads and unloads, one training run, at the same time",
        "tests/app/test_shared_pipeline.py",
        39,
    ),
}
