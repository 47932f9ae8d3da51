"""Writes an imported configuration as a recipe file, for `protoshard train FILE.py`."""

from typing import get_type_hints

from dali_loaders.names import printable
from pipeline.config import TrainConfig
from pipeline.interop.insightface import ImportedConfig

HERE = "str(Path(__file__).resolve().parent)"


def recipe_source(imported: ImportedConfig, origin: str) -> str:
    """The text of the file; its docstring says what of `origin` was not taken over, and what was chosen. The run's folder is the one that
    the file lies in, wherever it is moved and from wherever it is started."""
    sections: dict[str, dict[str, str]] = {}
    for dotted, value in imported.fields.items():
        section, _, name = dotted.partition(".")
        sections.setdefault(section, {})[name] = repr(value)
    sections.setdefault("run", {})["folder"] = HERE
    loss_name = sections["loss"].pop("name")
    kinds = get_type_hints(TrainConfig)
    builders = {section: f"{kinds[section].__name__}(" for section in sections} | {"loss": f"losses.build({loss_name}, "}
    calls = [f"        {s}={builders[s]}{', '.join(f'{name}={value}' for name, value in part.items())}),\n" for s, part in sections.items()]
    remarks, choices = ("".join(f"  {line}\n" for line in part) or "  nothing\n" for part in (imported.unmapped, imported.chosen))
    names: dict[str, set[str]] = {"partial_fc": {"losses"}, TrainConfig.__module__: {"TrainConfig"}}
    for section in sections.keys() - {"loss"}:
        names.setdefault(kinds[section].__module__, set()).add(kinds[section].__name__)
    imports = "".join(f"from {module} import {', '.join(sorted(names[module]))}\n" for module in sorted(names))
    # Without a quote or a backslash nothing can end the docstring; the values are those of repr.
    heading = f"Imported from {printable(origin)}. Not taken over:\n{remarks}Chosen:\n{choices}".replace("\\", "/").replace('"', "'")
    call = f"def recipe() -> TrainConfig:\n    return TrainConfig(\n{''.join(calls)}    )\n"
    return f'"""{heading}"""\n\nfrom pathlib import Path\n\n{imports}\n\n{call}'
