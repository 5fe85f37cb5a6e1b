"""The commands that README.md and docs/*.md print, and all that the tests change about them.

Each is run as printed, in a directory where a reader would have what it needs. What differs stands here, and
nowhere else: step counts, cloud commands (DRY), and what is not run at all (NOT_RUN), with the reason.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests import chats
from tests.command import REPOSITORY

PAGES = ("README.md", *sorted(str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("docs/*.md")))
PROGRAMS = ("python", "python3", "pip", "make", "docker")
RUN = "python run.py "

# Steps of what trains: as many as are printed, or these where that is less.
STEPS = {"digits": 40}  # enough for a profile of steps 20 to 30, and for two periods of 20
OTHER_STEPS = 5
VERIFIED_STEPS = 3

NOT_RUN = {
    "make run": "the gate's own targets: install and run",
    "make test": "the gate's own targets: this suite",
    "python3 -m venv .venv": "the gate makes environments",
    "pip install -r requirements.txt": "the gate installs every requirements file",
    "pip install -r requirements/dev.txt": "the gate installs every requirements file",
    "docker build": "needs a Docker daemon",
    "docker push": "needs a registry",
}
DRY = {  # started with --dry-run
    "launch tpu-vm": "needs an account at Google Cloud",
    "launch gke": "needs a Kubernetes cluster",
    "launch slurm": "needs four nodes with GPUs; tests/multiprocess/slurm starts a real Slurm",
}
# What ends otherwise than with 0: (exit code, what is said).
ENDS = {"data prepare --experiment mnist": (2, "pip install tensorflow")}
# More devices than those of the tests: in a process of their own.
FRESH = ("plan --experiment llama3_8b",)
# Half a minute or more, in four processes, in the TPU compiler or for many meshes.
SLOW = (
    "launch local --processes 4 --devices-per-process 2 --restarts 3 --experiment digits --mesh.data 8",
    "compare --experiment digits --simulate 8 --mesh.replica 8 --mesh.data 1 --network wan",
    "verify --experiment digits --simulate 8 --mesh.data 2 --mesh.fsdp 4",
    "plan --experiment llama3_8b --show scaling",
    "--experiment digits --privacy.epsilon 8",
    "verify --experiment digits --simulate 8 --all-meshes --json verify.json",
    "plan --experiment llama3_8b --target v5p:4x4x4 --mesh.data 1 --mesh.fsdp -1 --model.attention splash",
    "plan --experiment llama3_8b --target v5p:4x4x4 --search --best 3 --html search.html",
    "plan --experiment clicks --target v5e:2x4",
    "--experiment criteo_dlrm",
    "--experiment sft --init.from",
    "--experiment dpo",
    "--experiment translate_help",
    "eval --experiment translate_help",
    "sample --experiment translate_help",
    "--experiment topics",
    "--experiment sft",
    "--experiment hf --init.from LLAMA --data.files",
    "--experiment distill",
)
# Of the first page, what `make test` leaves out: more than some seconds, or as another command does.
LONG = (
    "--experiment lm_stdlib",
    "--experiment digits --optimizer muon",
    "--experiment digits --data.transforms crop:1",
    "--experiment digits --train.epochs 5",
    "verify --experiment digits",
    "compare --experiment digits",
    "sample --experiment lm_stdlib",
)


def tier(page: str, line: str) -> str:
    """The mark of a command: "" in `make test`, "gate" or "slow"."""
    if line.startswith(SLOW):
        return "slow"
    return "gate" if page != PAGES[0] or line.startswith(LONG) else ""


def commands(page: str) -> list[str]:
    """The commands in the plain code blocks of a page, continuation lines joined, comments left out."""
    text = (REPOSITORY / page).read_text()
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language:
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.startswith(tuple(f"{program} " for program in PROGRAMS)):
                found.append(re.split(r"\s{2,}(?![\s-])|\s+#\s", line)[0])
    return found


def run_py(page: str) -> list[str]:
    """Those of run.py, without `python run.py`."""
    return [line.removeprefix(RUN) for line in commands(page) if line.startswith(RUN)]


def words(line: str) -> list[str]:
    """The words of a command of run.py, with fewer steps, and --dry-run where it needs a cloud."""
    found = shlex.split(line)
    if line.startswith(tuple(DRY)):
        place = 3 if found[2] in ("stop", "logs") else 2
        return [*found[:place], "--dry-run", *found[place:]]
    if found[0] == "verify":
        return _with(found, "--steps", VERIFIED_STEPS)
    trains = found[0] in ("--experiment", "compare", "launch")
    if not trains or "--dry-run" in found or "--train.epochs" in found:
        return found
    most = STEPS.get(found[found.index("--experiment") + 1], OTHER_STEPS)
    return _with(found, "--train.steps", most)


def _with(found: list[str], flag: str, most: int) -> list[str]:
    """The words with at most so many steps."""
    if flag not in found:
        return [*found, flag, str(most)]
    where = found.index(flag) + 1
    return [*found[:where], str(min(int(found[where]), most)), *found[where + 1 :]]


def needs(page: str, line: str) -> list[str]:
    """The commands of a page that must have been run, so that there is what this one reads."""
    read = re.findall(r"--init\.from (runs/\S+)", line)
    if line.startswith(("eval", "predict", "sample", "recommend", "export")):
        read.append(_directory(line))
    if line.startswith("runs"):
        read.append("runs/digits")
    trained = {
        _directory(each): each for each in reversed(run_py(page)) if each.startswith("--exp")
    }
    return [trained.get(place, f"--experiment {Path(place).name}") for place in read]


def _directory(line: str) -> str:
    """The run directory of a command."""
    found = shlex.split(line)
    if "--run.dir" in found:
        return found[found.index("--run.dir") + 1]
    return (
        f"runs/{Path(found[found.index('--experiment') + 1]).stem}"
        if "--experiment" in found
        else ""
    )


# docs/finetune.md starts a GPT-2 of the reader's from a directory of Hugging Face's: a tiny one here.
GPT2 = '''"""A tiny GPT-2 on random tokens.

python run.py --experiment gpt2.py        # some seconds; expect nothing
"""

import numpy as np

from spmd import Experiment
from spmd.data import Arrays
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel

GPT2 = dict(norm="layer", activation="gelu", position="learned", bias=True, tied=True)


def examples():
    tokens = np.random.default_rng(0).integers(0, 60, (32, 16)).astype(np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}


def config():
    return Experiment(
        model=Transformer(vocab=60, length=16, layers=2, embed=32, heads=4, **GPT2),
        task=LanguageModel(),
        data=Arrays(
            train=examples,
            eval=examples,
            batch_size=8,
            features={"tokens": ((16,), "int32"), "targets": ((16,), "int32")},
        ),
        optimizer=AdamW(),
    )
'''


# What a page's commands import beside the requirements.
IMPORTS = {"docs/chat.md": "jinja2"}


def recipes() -> dict[str, str]:
    """Name -> text of the experiment files that docs/extending.md prints."""
    text = (REPOSITORY / "docs/extending.md").read_text()
    return dict(re.findall(r"^`(\w+)\.py`:\n+```python\n(.*?)^```$", text, re.M | re.S))


def _checkpoint(directory: Path) -> None:
    """LLAMA, a directory as transformers writes it, with a tokenizer; TEXT, a folder of texts."""
    import jax
    import tokenizers

    from spmd.models.transformer import Transformer
    from spmd.tasks import LanguageModel
    from spmd.weights.huggingface import write

    model = Transformer(vocab=300, length=64, layers=2, embed=32, heads=4, mlp=48)
    params, _ = jax.jit(LanguageModel().build(model).init)(jax.random.key(0))
    write.write(str(directory / "LLAMA"), model, params)
    tokenizer, text = tokenizers.ByteLevelBPETokenizer(), "several words, and more of them\n" * 200
    tokenizer.train_from_iterator([text], 270, show_progress=False)
    tokenizer.save(str(directory / "LLAMA/tokenizer.json"))
    (directory / "TEXT").mkdir()
    (directory / "TEXT/words.txt").write_text(text)


def _images(directory: Path) -> None:
    """Folders of images, by class and without."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(90):
        folder = (
            directory / "flowers" / ("rose", "tulip")[i % 2] if i < 80 else directory / "unsorted"
        )
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


def prepare(page: str, directory: Path) -> None:
    """Writes what the names in a page's commands stand for: gpt2.py, DIR, recipes."""
    if page == "docs/extending.md":
        for name, text in recipes().items():
            (directory / f"{name}.py").write_text(text)
    if page == "docs/data.md":
        _images(directory)
    if page == "docs/chat.md":
        chats.write_checkpoint(directory / "LLAMA")
        chats.write_records(directory)
        (directory / "TEXT").mkdir()
        (directory / "TEXT/words.txt").write_text("several words, and more of them\n" * 200)
    if page == "docs/finetune.md":
        import spmd
        from spmd.weights.huggingface import write

        (directory / "gpt2.py").write_text(GPT2)
        tiny = spmd.load(str(directory / "gpt2.py"))
        start = tiny.init()
        params, _ = start.program.task.plain(*start.variables)
        write.write(str(directory / "DIR"), tiny.experiment.model, params)
        _checkpoint(directory)
    if page == "docs/reliability.md":
        (directory / "DIR").symlink_to("runs/digits")
