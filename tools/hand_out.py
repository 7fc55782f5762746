"""The students' copy of this repository: python tools/hand_out.py FOLDER

In vae_lib.py, what students write raises NotImplementedError, and what only our solution needs is
gone. The notebook lacks the cells tagged `solution`; README, what is for others. All else is copied
as it is now: other images in data/ and a changed text are in the copy, too.
"""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What students write in vae_lib.py: functions, methods, classes with all their methods.
WRITE = ("Encoder", "Latent.forward", "Decoder", "reconstruction_loss", "kl_divergence", "train")
# What nothing but our own notebook calls. What only these and the bodies above use goes, too.
RECIPE = ("best_decoder", "log_likelihood")
GIVEN = ("Losses",)  # for what students write
# What vae_lib.py says of our training, in place of which the copy says: {pattern: text}
TRAINING = {
    r", and kl = information \+ marginal_kl": "",
    r" information marginal_kl\"": '"',
    r"# The training: .*(\n# .*)*": "# The training",
    r", draws=1\)": ")",
}
# The files of the copy, beside the three that are changed for it.
FILES = (
    *(".gitattributes", ".gitignore", ".github/workflows/grade.yml", "LICENSE", "pyproject.toml"),
    *("environment.yml", "requirements.txt", "page.py", "page.html.j2", "plots.py"),
    *("tests/*.py", "tests/*.sh", "data/*/[!.]*.[pP][nN][gG]"),
)
SECTIONS = ("For students", "Where it runs", "Licence and credits")  # of README.md that stay

INTRODUCTION = """\
# Assignment: a variational autoencoder

A variational autoencoder (VAE) turns each image into a few numbers and draws it again; then it
draws new images from random numbers. Here you write one that learns the images of `data/train`.
These parts of `vae_lib.py` raise `NotImplementedError` until you have written them:
NAMES.

With Python 3.11, 3.12 or 3.13, in this folder, the first two commands install what is needed. The
third runs the notebook: it trains your model, writes the five files to hand in, and makes a page to
read in a browser, `assignment_09.html`. (Windows, Linux: [Where it runs](#where-it-runs) first.)

COMMANDS

| file | what it is |
|---|---|
| `vae_lib.py` | where you write; around it stands what is given |
| `assignment_09.ipynb` | the task; how your model is trained, looked at, scored and exported |
| `plots.py`; `page.py`; `page.html.j2` | the pictures; how a page is made of the notebook |
| `data/` | the images, where they come from, their licence |
| `tests/` | what grades |
"""


# vae_lib.py


def find(source, name):
    """The definition of `Name` or `Class.method` in a Python source: a node of its tree."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", "") == part), None)
        if node is None:
            sys.exit(f"vae_lib.py has no {name}: change WRITE in tools/hand_out.py")
    return node


def first_paragraph(lines, node):
    """A definition's lines from its name to the end of the first paragraph of its docstring."""
    if ast.get_docstring(node) is None:
        return lines[node.lineno - 1 : node.body[0].lineno - 1]
    text = lines[node.lineno - 1 : node.body[0].end_lineno]
    start = node.body[0].lineno - node.lineno
    if "" in text[start:]:
        end = text.index("", start)
        text = [*text[:end], " " * node.body[0].col_offset + '"""']
        if end == start + 1:  # a single line
            text[-2:] = [text[-2] + '"""']
    return text


def stub(lines, node, name):
    """The lines of a definition that raises NotImplementedError in place of what it did."""
    text = first_paragraph(lines, node)
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef):
                text += ["", *stub(lines, method, name)]
        return text
    indent = " " * node.body[0].col_offset
    if node.name == "__init__":
        text.append(f"{indent}super().__init__()")
    return [*text, f'{indent}raise NotImplementedError("{name} in vae_lib.py has to be written")']


def students_library(source):
    """vae_lib.py as students get it."""
    ours = used(source)
    for name in WRITE:
        lines = source.splitlines()
        node = find(source, name)
        lines[node.lineno - 1 : node.end_lineno] = stub(lines, node, name)
        source = "\n".join(lines) + "\n"
    if "train" in WRITE:
        for pattern, text in TRAINING.items():
            source, count = re.subn(pattern, text, source)
            if count != 1:
                sys.exit(f"{pattern!r} is {count} times in vae_lib.py: change TRAINING here")
    before = None
    while before != source:  # what is gone may have been the last to use something else
        before = source
        source = without(source, (ours | set(RECIPE)) - used(source) - {*WRITE, *GIVEN})
    return without_unused_imports(source)


def used(source):
    """The names that a Python source uses, but for those that only their own definition uses."""
    found = set()
    for node in ast.parse(source).body:
        names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        found |= names - {defined(node)}
    return found


def defined(node):
    """The name that a statement of a module defines."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(target, "name", getattr(target, "id", None))


def without(source, names):
    """A Python source without the definitions of these names."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if defined(node) in names:
            first = min(each.lineno for each in [node, *getattr(node, "decorator_list", [])])
            del lines[first - 1 : node.end_lineno]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines) + "\n")


def without_unused_imports(source):
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [n for n in node.names if (n.asname or n.name).split(".")[0] in used(source)]
            if kept != node.names:
                node.names = kept
                lines[node.lineno - 1 : node.end_lineno] = [ast.unparse(node)] if kept else []
    return "\n".join(lines) + "\n"


# The notebook, README


def students_notebook(text):
    """The notebook as students get it, and the new number of each section that is left."""
    notebook = json.loads(text)
    cells = notebook["cells"]
    cells = [cell for cell in cells if "solution" not in cell["metadata"].get("tags", [])]
    left = re.findall(r"^## (\d+)\. ", "\n\n".join("".join(cell["source"]) for cell in cells), re.M)
    numbers = {old: str(new) for new, old in enumerate(left, 1)}
    for cell in cells:
        renumbered = renumber("".join(cell["source"]), numbers)
        cell["source"] = renumbered.splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    notebook["cells"] = cells
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", numbers


def renumber(text, numbers):
    """A text with new numbers in the headings of sections and where it names a section."""

    def new(match):
        if match[2] not in numbers:
            sys.exit(f"section {match[2]} is named, but not in the copy: {text[:200]!r}")
        return match[1] + numbers[match[2]]

    return re.sub(r"(^## |\b[Ss]ections? )(\d+)\b", new, text, flags=re.MULTILINE)


def sections(text):
    """The sections of a Markdown text, {title: text with its title}; what is above them is ''."""
    first, *others = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {"": first} | {part.splitlines()[0].removeprefix("## "): part for part in others}


def students_readme(text, numbers):
    """README.md as students get it."""
    parts = sections(text)
    missing = set(SECTIONS) - set(parts)
    if missing:
        sys.exit(f"README.md has no section {missing}: change SECTIONS in tools/hand_out.py")
    introduction = INTRODUCTION.replace("NAMES", ", ".join(f"`{name}`" for name in WRITE))
    commands = re.search(r"<!-- command:run -->\n(```.*?```)", text, re.DOTALL)
    introduction = introduction.replace("COMMANDS", commands[1])
    return "\n".join([introduction, renumber("".join(parts[x] for x in SECTIONS), numbers)])


def hand_out(folder):
    """Make the copy in a folder that is empty, or not there yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"{folder} is not an empty folder: name one that is, or that does not exist yet")
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    texts = {}
    for name in ("vae_lib.py", "assignment_09.ipynb", "README.md", "data/README.md"):
        texts[name] = (ROOT / name).read_text(encoding="utf-8")
    texts["vae_lib.py"] = students_library(texts["vae_lib.py"])
    texts["assignment_09.ipynb"], numbers = students_notebook(texts["assignment_09.ipynb"])
    texts["README.md"] = students_readme(texts["README.md"], numbers)
    about_data = sections(texts["data/README.md"])
    about_data.pop("For maintainers", None)
    texts["data/README.md"] = "".join(about_data.values())
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python tools/hand_out.py FOLDER (a new one, for the students' copy)")
    folder = Path(sys.argv[1])
    hand_out(folder)
    print(f"{folder} is the students' copy. In its vae_lib.py they write {', '.join(WRITE)}.")
    print("Read its README.md, then give it out as a repository of its own, or as a zip file.")
    print("Grade what comes back from here: python tests/grade.py SUBMISSION")


if __name__ == "__main__":
    main()
