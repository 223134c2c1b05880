"""Every wrong command line: its exit code and the one line it gets, to the letter; nothing on stdout, no file made."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
from image_files import write_folder
from outcome import TINY, Run
from safetensors.torch import load_file, save_file

ON_DIGITS = ("eval", "test_vit", "--data", "digits")
DEIT = ("profile", "deit_tiny", "--no-latency")
COMPRESS = ("compress", *TINY, "-o", "{tmp}/out.safetensors")
EVAL = ("eval", "{file}", "-j", "0")

# (words, exit code, the line): {tmp} is an empty folder, {file} a tokencut file, {pictures} a folder of images.
WRONG = [
    # What the parser finds.
    (("profle",), 2, "unknown command 'profle', did you mean profile? commands are compress, profile, eval, compare, "
                     "predict, export, sweep, visualize, models, info, cache; type tokencut --help"),
    (("xyz",), 2, "unknown command 'xyz'; commands are compress, profile, eval, compare, predict, export, sweep, "
                  "visualize, models, info, cache; type tokencut --help"),
    (("profile", "--kep", "1"), 2, "no such option --kep, did you mean --keep? type tokencut profile --help"),
    (("profile", "a", "b"), 2,
     re.compile(r"got unexpected extra argument(\(s\))? \(b\); type tokencut profile --help")),
    (("compress", "deit_tiny"), 2, "missing option '-o' / '--output'; type tokencut compress --help"),
    (("compress", "-o", "x.safetensors"), 2, "missing argument 'MODEL'; type tokencut compress --help"),
    (("profile", "--keep"), 2, "option '--keep' requires an argument; type tokencut profile --help"),
    (("profile", "--batch-size", "many"), 2,
     "invalid value for '-b' / '--batch-size': 'many' is not a whole number from 1 to 65536, "
     "such as 64; type tokencut profile --help"),
    (("profile", "--precision", "fp8"), 2,
     "invalid value for '--precision': 'fp8' is not one of fp32, bf16, fp16; type tokencut profile --help"),
    ((*COMPRESS, "--quantize", "int4"), 2,
     "unknown kind of quantised weights 'int4', expected int8 or fp8; type --quantize int8"),
    ((*COMPRESS, "--allow-drop", "2"), 2,
     "--allow-drop says what --quantize may cost; type --quantize int8 as well, or leave it out"),
    ((*COMPRESS, "--quantize", "int8", "--allow-drop", "-1"), 2,
     "invalid value for '--allow-drop': -1 is not a number from 0 to 100, such as 2.0; type tokencut compress --help"),
    # Keep rates.
    ((*DEIT, "--keep", "0"), 2,
     "keep 0 is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as --keep 0.7"),
    ((*DEIT, "--keep", "1.2"), 2,
     "keep 1.2 is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as --keep 0.7"),
    ((*DEIT, "--keep", "-0.5"), 2,
     "keep -0.5 is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as --keep 0.7"),
    ((*DEIT, "--keep", "nan"), 2,
     "keep nan is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as --keep 0.7"),
    ((*DEIT, "--keep", "half"), 2,
     "keep half is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as --keep 0.7"),
    ((*DEIT, "--keep", "0.9/1.2/0.5"), 2,
     "keep 1.2 in --keep 0.9/1.2/0.5 is not a number in (0, 1]; it is the fraction of the image tokens that stay, such "
     "as --keep 0.7"),
    ((*DEIT, "--keep", "0.9/"), 2,
     "keep nothing in --keep 0.9/ is not a number in (0, 1]; it is the fraction of the image tokens that stay, such as "
     "--keep 0.7"),
    ((*DEIT, "--keep", "0.9,0.7"), 2,
     "--keep 0.9,0.7 has commas, which only sweep takes; for one rate per layer join them by /: --keep 0.9/0.7"),
    ((*DEIT, "--keep", "0.9/0.7/0.5", "--layers", "4,7"), 2,
     "3 keep rates for 2 layers; give one number for all, or one per layer, such as --keep 0.7/0.7"),
    ((*DEIT, "--keep", "0.7", "--reduce-by", "8"), 2, "--keep and --reduce-by exclude each other; type one of them"),
    ((*DEIT, "--reduce-by", "0"), 2,
     "invalid value for '--reduce-by': 0 is not a whole number from 1 to 65536, such as 13; "
     "type tokencut profile --help"),
    ((*DEIT, "--keep", "0,5"), 2, "--keep 0,5 has a comma; type --keep 0.5"),
    ((*DEIT, "--keep", ""), 2, "there is an empty argument behind --keep; is a variable of your shell not set?"),
    (("eval", "digits", "--data="), 2,
     "there is an empty argument behind --data; is a variable of your shell not set?"),
    # Layers.
    ((*DEIT, "--layers", "0,4"), 2,
     "layer 0 does not exist: this model has blocks 1 to 12, such as --layers 4,7,10"),
    ((*DEIT, "--layers", "4,13"), 2,
     "layer 13 does not exist: this model has blocks 1 to 12, such as --layers 4,7,10"),
    ((*DEIT, "--layers", "4,4,7"), 2, "layer 4 is given twice; name each block once, such as --layers 4,7"),
    ((*DEIT, "--layers", "7,4"), 2, "layers 7,4 are not in ascending order; write --layers 4,7"),
    ((*DEIT, "--layers", "4;7"), 2,
     "--layers 4;7 is not a list of block numbers, such as --layers 4,7,10 or 4-10, nor one of all, late, gradual"),
    ((*DEIT, "--layers", "latest"), 2,
     "--layers latest is not a list of block numbers, such as --layers 4,7,10 or 4-10, nor one of all, late, gradual, "
     "did you mean late?"),
    ((*DEIT, "--layers", "gradual"), 2,
     "--layers gradual needs an explicit rate, since 0.7 in so many blocks leaves next to nothing; add --keep 0.95 or "
     "--reduce-by 8"),
    ((*DEIT, "--layers", "all"), 2,
     "--layers all needs an explicit rate, since 0.7 in so many blocks leaves next to nothing; add --keep 0.95 or "
     "--reduce-by 8"),
    # Methods.
    ((*DEIT, "--method", "topp"), 2,
     re.compile(r"unknown method 'topp', did you mean topk\? methods are .*bat, .*evit, .*topk, .*window")),
    ((*DEIT, "--method-option", "clusters"), 2,
     "--method-option clusters is not of the form key=value, such as --method-option clusters=0.25"),
    ((*DEIT, "--method-option", "pairs=0", "--method-option", "pairs=1"), 2,
     "--method-option gives pairs twice; type it once, such as --method-option pairs=1"),
    # Models.
    (("profile", "deit_tny"), 2,
     re.compile(r"unknown model 'deit_tny', did you mean deit_tiny.*\? 'tokencut models' lists the names")),
    (("profile", "{tmp}/none.safetensors"), 2,
     "no such file: {tmp}/none.safetensors; give a file that 'tokencut compress MODEL -o FILE' wrote"),
    (("models", "xyzzy"), 1, "no supported model matches 'xyzzy'; type tokencut models for all of them"),
    (("models", "deit", "--methods"), 2,
     "PATTERN deit picks models, --methods lists methods; type tokencut models --methods"),
    (("info", "{tmp}/none.safetensors"), 2,
     "{tmp}/none.safetensors does not exist; type 'tokencut compress MODEL -o {tmp}/none.safetensors' to make one"),
    (("info", "{tmp}"), 2,
     "{tmp} is a folder, not a file; type 'tokencut compress MODEL -o {tmp}/out.safetensors' to make one"),
    # Paths that name no file, and home folders.
    *(((*words, option, place), 2, re.compile(rf".* type {option} /?\w+\.\w+(, or --format timm.*)?"))
      for place in ("./", "/") for *words, option in (
          ("compress", *TINY, "-o"), ("export", *TINY, "-o"), ("visualize", *TINY, "{pictures}", "-o"),
          ("predict", *TINY, "{pictures}", "-o"), ("eval", *TINY, "--data", "{pictures}", "--predictions"),
          ("profile", *TINY, "--target-gmacs", "0.01", "--calibration", "digits", "--front"))),
    *(((*words, "~nosuchuser/x"), 2, "there is no home folder ~nosuchuser, where ~nosuchuser/x would lie; give the "
       "whole path, or ./~nosuchuser/x where it is called so")
      for words in (("info",), ("profile",), ("eval", "{file}", "--data"), ("compress", *TINY, "-o"),
                    ("predict", "{file}"), ("profile", *TINY[:2], "--checkpoint"),
                    ("eval", "{file}", "--data", "digits", "--class-map"))),
    (("profile", "local-dir:~nosuchuser/x"), 2, re.compile("there is no home folder ~nosuchuser, .*")),
    # What is there and no file.
    (("profile", "/dev/null"), 2, re.compile("/dev/null is a device, not a file; give a file that .*")),
    (("info", "/dev/null"), 2, re.compile("/dev/null is a device, not a file; type .*")),
    (("eval", "{file}", "--data", "/dev/null"), 1, re.compile("no images at '/dev/null': it is a device, not a .*")),
    ((*ON_DIGITS, "--checkpoint", "/dev/null"), 1, re.compile("the checkpoint /dev/null is a device, not a file; .*")),
    ((*ON_DIGITS, "--class-map", "/dev/null"), 1, re.compile(".* it is a device, not a file; .*")),
    # What may have been meant.
    ((*COMPRESS, "--epochs", "3"), 2,
     "no such option --epochs, did you mean --finetune-epochs? type tokencut compress --help"),
    (("eval", "digits", "--num-workers", "3"), 2,
     "no such option --num-workers, did you mean --workers? type tokencut eval --help"),
    (("profile", "--batch", "3"), 2, "no such option --batch, did you mean --batch-size? type tokencut profile --help"),
    (("eval", "digits", "--epochs", "3"), 2, "no such option --epochs; type tokencut eval --help"),
    (("--json", "models"), 2, re.compile("no such option --json before a command; type it behind one, .*")),
    (("profile", "{file}", "--dense", "--no-prop-attn"), 2,
     "--dense is the untouched model, to which --no-prop-attn cannot apply; leave one out"),
    (("hepl",), 2, re.compile("unknown command 'hepl', did you mean help.*")),
    (("profile", "{file}", "--num-classes", "10"), 2,
     "{file} is a file with its own weights and architecture, and takes no arguments of the architecture; leave that "
     "out, or name an architecture as MODEL"),
    (("profile", "{file}", "--no-pretrained"), 2,
     "{file} is a file with its own weights and architecture, and takes no --no-pretrained; leave that out, or name an "
     "architecture as MODEL"),
    (("profile", "{file}", "--checkpoint", "{file}"), 2,
     "{file} is a file with its own weights and architecture, and takes no --checkpoint; leave that out, or name an "
     "architecture as MODEL"),
    ((*DEIT, "--model-kwargs", "depth"), 2,
     "--model-kwargs 'depth' is not key=value; type --model-kwargs img_size=384"),
    # Dense and compressed at once.
    (("profile", "{file}", "--dense", "--keep", "0.5"), 2,
     "--dense is the untouched model, to which --keep cannot apply; leave one out"),
    # Outputs.
    ((*COMPRESS[:-1], "{tmp}/nowhere/out.safetensors"), 1,
     "cannot write {tmp}/nowhere/out.safetensors: the folder {tmp}/nowhere does not exist; create it first"),
    ((*COMPRESS[:-1], "{file}"), 1, "{file} exists; add --force to replace it, or give another -o"),
    ((*COMPRESS[:-1], "{tmp}/out.bin"), 2,
     "{tmp}/out.bin does not end in .safetensors, by which timm and others tell the format; type -o "
     "{tmp}/out.safetensors"),
    # Images.
    (("eval", "{file}"), 2,
     "eval needs images; type tokencut eval {file} --data DIR, a folder with one sub-folder a class or a .tar of one, "
     "or try it with tokencut eval digits --data digits"),
    ((*EVAL, "--data", "{tmp}/none"), 1,
     "no images at '{tmp}/none': it does not exist; expected a folder with one sub-folder a class, a .tar, .tar.gz "
     "or .zip of one, a .csv list of images, or the word digits"),
    ((*EVAL, "--data", "{file}"), 1,
     "'{file}' is a file of an unknown kind: expected a folder with one sub-folder a class, a .tar, .tar.gz or .zip "
     "of one, a .csv list of images, or the word digits"),
    ((*EVAL, "--data", "{pictures}", "--limit", "0"), 2,
     "invalid value for '--limit': 0 is not a whole number from 1 to 1000000000, such as 1000; "
     "type tokencut eval --help"),
    ((*EVAL, "--data", "{pictures}", "--batch-size", "0"), 2,
     "invalid value for '-b' / '--batch-size': 0 is not a whole number from 1 to 65536, such as 64; "
     "type tokencut eval --help"),
    ((*EVAL, "--data", "{pictures}", "--workers", "-1"), 2,
     "invalid value for '-j' / '--workers': -1 is not a whole number from 0 to 1024, such as 0; "
     "type tokencut eval --help"),
    ((*COMPRESS, "--data", "{tmp}/none"), 1,
     "no images at '{tmp}/none': it does not exist; expected a folder with one sub-folder a class, a .tar, .tar.gz "
     "or .zip of one, a .csv list of images, or the word digits"),
    # Devices.
    ((*EVAL, "--data", "digits", "--predictions", "{file}"), 2,
     re.compile(r"--predictions \S+ does not end in .csv, and predictions are written as CSV; type --predictions \S+")),
    ((*EVAL, "--data", "digits", "--seed", "9" * 30), 2, re.compile(r".*9 is not a whole number from .*")),
    (("profile", "deit_tiny", "--img-size", "8"), 1, re.compile(r"the model has no patches of 16 px.*")),
    (("profile", "deit_tiny", "--model-kwargs", "depth=0"), 2,
     "--model-kwargs depth=0 is not a whole number from 1 to 128; type --model-kwargs depth=12"),
    ((*DEIT, "--no-latency", "--compile-mode", "foo"), 2, re.compile(r"unknown compile mode 'foo', expected .*")),
    ((*DEIT, "--no-latency", "--compile", "--capture"), 2,
     "--capture and --compile are two ways to run a model, expected one of them; type --compile-mode reduce-overhead, "
     "which compiles it and captures that"),
    (("profile", "hf-hub:"), 2, "'hf-hub:' names no repository of the hub; type hf-hub:OWNER/NAME"),
    (("profile", "hf-hub:a/b/c"), 2, "'hf-hub:a/b/c' names no repository of the hub; type hf-hub:OWNER/NAME"),
    ((*DEIT, "--method-option", "mass=inf"), 2, re.compile(r".*mass.*a number from 0.0 to 100.0.*")),
    ((*DEIT, "--device", "tpu"), 2,
     "unknown device 'tpu', expected auto, cpu, cuda, cuda:N or mps; type --device auto"),
    (("profile", *TINY, "--batch-size", "0"), 2,
     "invalid value for '-b' / '--batch-size': 0 is not a whole number from 1 to 65536, such as 64; "
     "type tokencut profile --help"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "line"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_wrong_command_line(
    run: Run,
    tmp_path: Path,
    compressed: Path,
    pictures: Path,
    words: tuple[str, ...],
    code: int,
    line: str | re.Pattern[str],
) -> None:
    def fill(text: str) -> str:
        return (
            text.replace("{tmp}", str(tmp_path)).replace("{file}", str(compressed)).replace("{pictures}", str(pictures))
        )

    done = run(*map(fill, words))
    assert (done.code, done.out if "--json" not in words else "") == (code, "")
    *notes, last = done.err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    if isinstance(line, str):
        assert last == f"error: {fill(line)}"
    else:
        assert line.fullmatch(last.removeprefix("error: "))
    assert list(tmp_path.iterdir()) == []


def refused(run: Run, *words: object) -> str:
    """The error line of a command that could not be carried out."""
    done = run(*words)
    assert (done.code, done.out) == (1, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_output_that_is_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").mkdir()
    assert "it is a folder" in refused(run, *COMPRESS[:-1], tmp_path / "out.safetensors")


def test_checkpoint_of_another_shape(run: Run, tmp_path: Path, compressed: Path) -> None:
    save_file(load_file(compressed), tmp_path / "weights.safetensors")
    line = refused(
        run, "compress", "test_vit", "--checkpoint", tmp_path / "weights.safetensors", "-o", tmp_path / "o.safetensors"
    )
    assert "does not fit this model" in line
    assert "--num-classes 3" in line


def test_truncated_file(run: Run, tmp_path: Path, compressed: Path) -> None:
    part = tmp_path / "part.safetensors"
    part.write_bytes(compressed.read_bytes()[:-1000])
    for words in (("profile", part), ("info", part), ("eval", part, "--data", "digits")):
        assert "truncated or damaged" in refused(run, *words)


def test_pickle_under_another_name(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"weights": 1}))
    assert "is a pickled PyTorch file, not safetensors" in refused(run, "profile", path)


def test_metadata_of_a_newer_format_and_of_wrong_types(run: Run, tmp_path: Path, compressed: Path) -> None:
    data = run("info", compressed, "--json").json
    del data["file"], data["tensors"]
    for edit, expected in (({"format": 99}, "pip install -U tokencut"), ({"recipe": 3}, "recipe")):
        path = tmp_path / "edited.safetensors"
        save_file(load_file(compressed), path, metadata={"tokencut": json.dumps({**data, **edit})})
        assert expected in refused(run, "info", path)


def test_folders_that_match_no_class(run: Run, tmp_path: Path, compressed: Path) -> None:
    folder = write_folder(tmp_path / "val", ("a", "b", "c", "d", "e"), images=1)
    line = refused(run, "eval", compressed, "-j", "0", "--data", folder)
    assert "5 class folders for the model's 3 classes" in line
    assert "'a', 'b', 'c'" in line


def test_a_model_without_a_head_has_no_accuracy(run: Run, pictures: Path) -> None:
    line = refused(run, "eval", *TINY[:-1], "0", "-j", "0", "--data", pictures)
    assert "has no classification head" in line


def test_the_recipe_of_a_trained_method_cannot_be_replaced(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "dyvit.safetensors"
    assert run("compress", *TINY, "--method", "dyvit", "-o", path).code == 0
    done = run("profile", path, "--no-latency", "--keep", "0.4", "--layers", "3")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {path} was trained for its recipe (dyvit, keep 0.7, layers 2,4,5), so --keep and --layers cannot "
        "replace it; leave out what was typed, or compress the original model\n"
    )
    assert run("profile", path, "--no-latency", "--dense").code == 0
