"""Facts about the 43 config files of arcface_torch (insightface at commit ab27f4d6, recognition/arcface_torch/configs), from which texts of
that form are made here. `python -m tests.pipeline.interop.official_configs` writes what becomes of them into the page on coming over."""

import tempfile
from pathlib import Path

from pipeline.interop.insightface import ImportedConfig, import_config

PAGE = Path(__file__).parents[3] / "docs" / "coming_from_insightface.md"
BEGIN, END = "<!-- official configs: begin -->\n", "<!-- official configs: end -->"
REMARKS = ("interclass_filtering_threshold", "dali_aug", "rec", "sample_rate", "mask_ratio", "gradient_acc", "num_epoch")
LONG = {"filter": "interclass_filtering_threshold"}
MARGINS = {"arcface": (1.0, 0.5, 0.0), "cosface": (1.0, 0.0, 0.4)}

# name, network, loss, sample rate, batch per GPU, lr, optimizer, weight decay, epochs, warm-up epochs, data, other options; base.py, which
# the others start from, has no epochs and no data.
FACTS = """
base                                 r50                  arcface 1   128 0.1   sgd   0.0005 -  -  -
3millions                            mbf                  cosface 0.1 512 0.1   sgd   0.0005 30 -1 synthetic
glint360k_mbf                        mbf                  cosface 1.0 128 0.1   sgd   0.0001 20 0  glint360k
glint360k_r100                       r100                 cosface 1.0 128 0.1   sgd   0.0001 20 0  glint360k
glint360k_r50                        r50                  cosface 1.0 128 0.1   sgd   0.0001 20 0  glint360k
ms1mv2_mbf                           mbf                  arcface 1.0 128 0.1   sgd   0.0001 40 0  faces_emore
ms1mv2_r100                          r100                 arcface 1.0 128 0.1   sgd   0.0005 20 0  faces_emore
ms1mv2_r50                           r50                  arcface 1.0 128 0.1   sgd   0.0005 20 0  faces_emore
ms1mv3_mbf                           mbf                  arcface 1.0 128 0.1   sgd   0.0001 40 0  ms1m-retinaface-t1
ms1mv3_r100                          r100                 arcface 1.0 128 0.1   sgd   0.0005 20 0  ms1m-retinaface-t1
ms1mv3_r50                           r50                  arcface 1.0 128 0.1   sgd   0.0005 20 0  ms1m-retinaface-t1
ms1mv3_r50_onegpu                    r50                  arcface 1.0 128 0.02  sgd   0.0005 20 0  ms1m-retinaface-t1
wf12m_conflict_r50                   r50                  cosface 1.0 128 0.1   sgd   0.0005 20 2  WebFace12M_Conflict
wf12m_conflict_r50_pfc03_filter04    r50                  cosface 0.3 128 0.1   sgd   0.0005 20 2  WebFace12M_Conflict filter=0.4
wf12m_flip_pfc01_filter04_r50        r50                  cosface 0.1 128 0.1   sgd   0.0005 20 2  WebFace12M_FLIP40   filter=0.4
wf12m_flip_r50                       r50                  cosface 1.0 128 0.1   sgd   0.0005 20 2  WebFace12M_FLIP40
wf12m_mbf                            mbf                  cosface 1.0 128 0.1   sgd   0.0001 20 0  WebFace12M
wf12m_pfc02_r100                     r100                 cosface 0.2 128 0.1   sgd   0.0005 20 0  WebFace12M
wf12m_r100                           r100                 cosface 1.0 128 0.1   sgd   0.0005 20 0  WebFace12M
wf12m_r50                            r50                  cosface 1.0 128 0.1   sgd   0.0005 20 0  WebFace12M
wf42m_pfc0008_32gpu_r100             r100                 cosface 0   512 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc02_16gpus_mbf_bs8k          mbf                  cosface 0.2 512 0.4   sgd   0.0001 20 2  WebFace42M
wf42m_pfc02_16gpus_r100              r100                 cosface 0.2 256 0.3   sgd   0.0005 20 1  WebFace42M
wf42m_pfc02_16gpus_r50_bs8k          r50                  cosface 0.2 512 0.6   sgd   0.0005 20 4  WebFace42M
wf42m_pfc02_32gpus_r50_bs4k          r50                  cosface 0.2 128 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc02_8gpus_r50_bs4k           r50                  cosface 0.2 512 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc02_r100                     r100                 cosface 0.2 128 0.1   sgd   0.0005 20 0  WebFace42M
wf42m_pfc02_r100_16gpus              r100                 cosface 0.2 128 0.2   sgd   0.0005 20 2  WebFace42M
wf42m_pfc02_r100_32gpus              r100                 cosface 0.2 128 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc02_vit_h                    vit_h                cosface 0.5 768 0.001 adamw 0.1    16 2  WebFace42M          dali_aug=True
wf42m_pfc03_32gpu_r100               r100                 cosface 0.3 128 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc03_32gpu_r18                r18                  cosface 0.3 128 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc03_32gpu_r200               r200                 cosface 0.3 128 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc03_32gpu_r50                r50                  cosface 0.3 128 0.4   sgd   0.0005 20 2  WebFace42M
wf42m_pfc03_40epoch_64gpu_vit_b      vit_b_dp005_mask_005 cosface 0.3 384 0.001 adamw 0.1    40 4  WebFace42M
wf42m_pfc03_40epoch_64gpu_vit_l      vit_l_dp005_mask_005 cosface 0.3 384 0.001 adamw 0.1    40 4  WebFace42M
wf42m_pfc03_40epoch_64gpu_vit_s      vit_s_dp005_mask_0   cosface 0.3 384 0.001 adamw 0.1    40 4  WebFace42M
wf42m_pfc03_40epoch_64gpu_vit_t      vit_t_dp005_mask0    cosface 0.3 384 0.001 adamw 0.1    40 4  WebFace42M
wf42m_pfc03_40epoch_8gpu_vit_b       vit_b_dp005_mask_005 cosface 0.3 256 0.001 adamw 0.1    40 4  WebFace42M          gradient_acc=12
wf42m_pfc03_40epoch_8gpu_vit_t       vit_t_dp005_mask0    cosface 0.3 512 0.001 adamw 0.1    40 4  WebFace42M
wf4m_mbf                             mbf                  cosface 1.0 128 0.1   sgd   0.0001 20 0  WebFace4M
wf4m_r100                            r100                 cosface 1.0 128 0.1   sgd   0.0005 20 0  WebFace4M
wf4m_r50                             r50                  cosface 1.0 128 0.1   sgd   0.0005 20 0  WebFace4M
"""


def text_of(fact: str) -> tuple[str, str]:
    """Name of a config and a text that sets its options."""
    name, network, loss, rate, batch, lr, optimizer, decay, epochs, warmup, data, *others = fact.split()
    options = {"margin_list": MARGINS[loss], "network": repr(network), "sample_rate": rate, "batch_size": batch, "lr": lr}
    options |= {"optimizer": repr(optimizer), "weight_decay": decay, "embedding_size": 512, "fp16": True, "resume": False, "output": None}
    if epochs != "-":
        options |= {"num_epoch": epochs, "warmup_epoch": warmup, "num_image": 1_000_000, "val_targets": []}
        options["rec"] = repr(data if data == "synthetic" else f"/train_tmp/{data}")
    options |= {LONG.get(other.partition("=")[0], other.partition("=")[0]): other.partition("=")[2] for other in others}
    lines = "".join(f"config.{option} = {value}\n" for option, value in options.items())
    return name, f"from easydict import EasyDict as edict\n\nconfig = edict()\n{lines}"


def import_all() -> dict[str, ImportedConfig | str]:
    """What becomes of each config: imported, or the sentence with which the import stops."""
    found: dict[str, ImportedConfig | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in map(text_of, FACTS.strip().splitlines()):
            path = Path(folder, f"{name}.py")
            path.write_text(text)
            try:
                found[name] = import_config(path)
            except ValueError as error:
                found[name] = str(error).removeprefix(f"{path} ")
    return found


def table() -> str:
    lines = ["| config | network here | loss | remarks |", "|---|---|---|---|"]
    for name, imported in import_all().items():
        if isinstance(imported, str):
            lines.append(f"| {name} | none: the import stops | | it {imported.partition(':')[0]} |")
            continue
        fields = imported.fields
        options = [f"{option}={fields[key]}" for option in ("drop_path", "mask_ratio") if (key := f"backbone.{option}") in fields]
        remarks = [line for line in [*imported.unmapped, *imported.chosen] if line.partition(":")[0] in REMARKS]
        network = " ".join([fields["backbone.name"], *options])
        lines.append(f"| {name} | {network} | {fields['loss.name']} {fields['loss.margin']} | {'; '.join(remarks)} |")
    return "\n".join(lines) + "\n"


def page_with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
